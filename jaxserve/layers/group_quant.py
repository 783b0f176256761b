"""Linear weights as integers of 4 or 8 bits with a scale and a zero for each group of inputs.

Reads what config.json says of such a checkpoint, whoever made it (AWQ, GPTQ, compressed-tensors). The
numbers are unpacked in `jaxserve.weights.grouped`.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from jaxserve.config import ConfigError
from jaxserve.layers.channel_quant import PACKED_FORMAT, config_groups, is_skipped, refuse_transforms
from jaxserve.layers.quant_config import quantization_of

METHOD = "groups"  # quant_method of our own, which an opened checkpoint has whatever it was
METHODS = "AWQ, GPTQ or compressed-tensors in groups"  # as messages name them
CODES, SCALES, ZEROS = SUFFIXES = (".codes", ".scales", ".zeros")  # of a weight's parts, after its name


@dataclass(frozen=True)
class GroupQuant:
    """How a checkpoint holds its linear weights: (code - zero) * scale, codes in 0 .. 2**bits - 1.

    Args:
        group_size: inputs in a row that share a scale and a zero; 0: all of them.
        skip: modules that are not quantised: names, or patterns (after `re:`, or of a shell).
        is_ordered: any inputs make up a group, not those in a row (act-order).
        plain: modules that are not, by their whole names: of the files, there may be thousands.
    """

    bits: int
    group_size: int
    skip: tuple[str, ...] = ()
    is_ordered: bool = False
    plain: frozenset[str] = frozenset()

    def covers(self, source: str) -> bool:
        """Whether the weight called `source` is quantised."""
        return source.removesuffix(".weight") not in self.plain and not is_skipped(source, self.skip)


def read_groups(hf_config: dict[str, Any]) -> GroupQuant | None:
    """From `quantization_config` of a checkpoint in such groups, else None.

    Raises ConfigError for a kind that is not read.
    """
    given = quantization_of(hf_config)
    match given.get("quant_method"):
        case "awq":
            return _read_awq(given)
        case "gptq":
            return _read_gptq(given)
        case "compressed-tensors":
            return _read_packed(given)
        case "groups":
            is_ordered = bool(given.get("is_ordered"))
            plain = frozenset(_skipped(given))
            return GroupQuant(_bits(given, (4, 8)), _group_size(given), (), is_ordered, plain)
    return None


def stores_zeros(given: dict[str, Any]) -> bool:
    """Whether zeros lie beside the codes, of a `quantization_config` that `read_groups` reads."""
    if given["quant_method"] != "compressed-tensors":
        return True
    return not all(group["weights"].get("symmetric", True) for group in config_groups(given))


def stores_zeros_less_one(given: dict[str, Any]) -> bool:
    """Whether they are stored one less than they are: in GPTQ's first format."""
    return given["quant_method"] == "gptq" and _gptq_format(given) == "gptq"


# ---- the formats ----


def _read_awq(given: dict[str, Any]) -> GroupQuant:
    """Source: AutoAWQ's names in quant_config.json (w_bit, q_group_size) and in config.json."""
    own_names = {"bits": given.get("w_bit"), "group_size": given.get("q_group_size")}
    given = own_names | {key: value for key, value in given.items() if value is not None}
    version = str(given.get("version") or given.get("format") or "gemm").lower()
    if version != "gemm" or given.get("backend") == "llm-awq":
        found = f"version={version!r}" if version != "gemm" else "backend='llm-awq'"
        raise _refused(f"AWQ with {found}", "version 'gemm' of AutoAWQ's")
    # AutoAWQ leaves out what has one of these words in its name.
    skip = (*(f"*{part}*" for part in _skipped(given)), "lm_head")
    return GroupQuant(_bits(given, (4,)), _group_size(given), skip)


def _read_gptq(given: dict[str, Any]) -> GroupQuant:
    kind = _gptq_format(given)
    if kind not in ("gptq", "gptq_v2") or given.get("is_marlin_format"):
        found = "is_marlin_format" if given.get("is_marlin_format") else f"checkpoint_format={kind!r}"
        raise _refused(f"GPTQ with {found}", "checkpoint_format 'gptq' or 'gptq_v2'")
    if given.get("pack_dtype") not in (None, "int32"):
        raise _refused(f"GPTQ with pack_dtype={given['pack_dtype']!r}", "'int32'")
    bits, group_size = _bits(given, (4, 8)), _group_size(given)
    is_ordered, skip = bool(given.get("desc_act")), [] if given.get("lm_head") else ["lm_head"]
    for pattern, change in (given.get("dynamic") or {}).items():
        change = change or {}
        if pattern.startswith("-:"):
            skip.append(f"re:{pattern[2:]}")
        elif _bits({**given, **change}, (4, 8)) != bits or _group_size({**given, **change}) != group_size:
            raise _refused(f"GPTQ with other bits or groups for {pattern!r} (dynamic)", "the same for all")
        else:
            is_ordered |= bool(change.get("desc_act"))
    if only := given.get("modules_in_block_to_quantize"):
        ends = [name for part in only for name in ([part] if isinstance(part, str) else part)]
        skip.append(rf"re:(?!.*\.(?:{'|'.join(map(re.escape, ends))})$)")
    return GroupQuant(bits, group_size, tuple(skip), is_ordered and group_size > 0)


def _gptq_format(given: dict[str, Any]) -> str:
    return given.get("checkpoint_format") or given.get("format") or "gptq"


def _read_packed(given: dict[str, Any]) -> GroupQuant | None:
    """Source: compressed-tensors' QuantizationConfig and QuantizationArgs."""
    groups = config_groups(given)
    if all(holder.get("format") != PACKED_FORMAT for holder in (given, *groups)):
        return None
    refuse_transforms(given)
    if given.get("kv_cache_scheme"):
        raise _refused("compressed-tensors with a kv_cache_scheme", "none, and --kv-cache-dtype")
    kinds = {_read_scheme(given, group) for group in groups}
    if len(kinds) != 1:
        raise _refused("compressed-tensors with no config_groups, or with ones that differ", "those alike")
    [(bits, group_size, is_ordered, _)] = kinds
    return GroupQuant(bits, group_size, tuple(given.get("ignore") or ()), is_ordered)


def _read_scheme(given: dict[str, Any], group: dict[str, Any]) -> tuple[int, int, bool, bool]:
    """(bits, group size, whether ordered, whether symmetric) of one of `config_groups`."""
    kind, weights = group.get("format") or given.get("format"), group.get("weights") or {}
    if kind != PACKED_FORMAT:
        raise _refused(f"compressed-tensors with format={kind!r} beside 'pack-quantized'", "one format")
    for part in ("input_activations", "output_activations"):
        if group.get(part):
            raise _refused(f"compressed-tensors with format='pack-quantized' and {part}", "weights alone")
    if weights.get("type", "int") != "int" or weights.get("dynamic"):
        raise _refused(f"compressed-tensors with packed weights of type={weights.get('type')!r}", "'int'")
    strategy, order = weights.get("strategy"), weights.get("actorder")
    if strategy not in ("group", "channel"):
        raise _refused(f"compressed-tensors with packed weights, strategy={strategy!r}", "'group', 'channel'")
    if order not in (None, False, True, "weight", "static", "group", "dynamic"):
        raise _refused(f"compressed-tensors with actorder={order!r}", "'weight', 'group', none")
    group_size = _group_size(weights) if strategy == "group" else 0
    bits, is_ordered = _bits({"bits": weights.get("num_bits")}, (4, 8)), order in (True, "group", "dynamic")
    return bits, group_size, is_ordered and group_size > 0, bool(weights.get("symmetric", True))


# ---- their keys ----


def _skipped(given: dict[str, Any]) -> tuple[str, ...]:
    return tuple(given.get("modules_to_not_convert") or ())


def _bits(given: dict[str, Any], valid: Collection[int]) -> int:
    bits = given.get("bits")
    if type(bits) is not int or bits not in valid:
        raise _refused(f"bits={bits!r}", " or ".join(map(str, valid)))
    return bits


def _group_size(given: dict[str, Any]) -> int:
    """0 where the file has -1: one group of all inputs."""
    size = given.get("group_size")
    if type(size) is not int or size < -1:
        raise _refused(f"group_size={size!r}", "a number of inputs, or -1 for all")
    return max(size, 0)


def _refused(found: str, valid: str) -> ConfigError:
    return ConfigError(f"config.json: quantization_config: {found} is not read; use {valid}")
