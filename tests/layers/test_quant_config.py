"""Values of a wrong kind in `quantization_config` are refused by name."""

import pytest

from jaxserve.config import ConfigError
from jaxserve.layers.channel_quant import read_stored
from jaxserve.layers.group_quant import read_groups

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}


@pytest.mark.parametrize(
    "given, message",
    [
        (["awq"], r"Expected `object`, got `array`"),
        ("awq", r"Expected `object`, got `str`"),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 128, "modules_to_not_convert": 5},
            r"\$\.modules_to_not",
        ),
        ({**GPTQ, "dynamic": []}, r"\$\.dynamic"),
        ({**GPTQ, "dynamic": {"x": 5}}, r"\$\.dynamic\[\.\.\.\]"),
        ({**GPTQ, "modules_in_block_to_quantize": "q_proj"}, r"\$\.modules_in_block_to_quantize"),
        ({**GPTQ, "modules_in_block_to_quantize": [5]}, r"\$\.modules_in_block_to_quantize\[0\]"),
        ({**GPTQ, "dynamic": {"-:*(": {}}}, r"pattern '\*\(': nothing to repeat"),
        ({**PACKED, "ignore": "lm_head"}, r"\$\.ignore"),
        ({**PACKED, "ignore": [3]}, r"\$\.ignore\[0\]"),
        ({**PACKED, "ignore": ["re:*("]}, r"pattern '\*\(': nothing to repeat"),
        ({**PACKED, "config_groups": [1]}, r"\$\.config_groups"),
        (
            {**PACKED, "config_groups": {"group_0": {"weights": "w4"}}},
            r"\$\.config_groups\[\.\.\.\]\.weights",
        ),
        ({**PACKED, "config_groups": {"group_0": {"weights": {"symmetric": "no"}}}}, r"weights\.symmetric"),
        ({**PACKED, "transform_config": "x"}, r"\$\.transform_config"),
    ],
    ids=str,
)
def test_value_of_another_kind_is_refused_by_name(given, message):
    for read in (read_groups, read_stored):
        with pytest.raises(ConfigError, match=message):
            read({"quantization_config": given})


def test_null_is_as_nothing():
    assert read_groups({"quantization_config": None}) is None
    given = {
        "quant_method": "awq",
        "bits": None,
        "w_bit": 4,
        "q_group_size": 64,
        "modules_to_not_convert": None,
    }
    groups = read_groups({"quantization_config": given})
    assert groups is not None and (groups.bits, groups.group_size) == (4, 64)
    assert read_groups({"quantization_config": {**GPTQ, "dynamic": {"+:.*": None}}}) is not None
