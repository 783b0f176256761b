"""tools.perplexity: what is predicted, and that its figures are the engine's logprobs."""

import json
import math
from pathlib import Path

import pytest

from jaxserve.config import ConfigError
from tools import perplexity
from tools.perplexity import windows

TRAINED = Path(__file__).parents[2] / "configs" / "tiny-deepseek"


@pytest.mark.parametrize("first", [(), (7,)])
@pytest.mark.parametrize("count", [2, 9, 10, 11, 12, 37])
def test_every_token_is_predicted_once_with_half_a_window_before_it(count, first):
    tokens = list(range(100, 100 + count))
    predicted = []
    for number, window in enumerate(windows(tokens, 10 + len(first), first)):
        assert len(window.token_ids) <= 10 + len(first)
        assert tuple(window.token_ids[: len(first)]) == first
        assert number == 0 or window.num_context - len(first) >= 5
        predicted += window.token_ids[window.num_context :]
    assert predicted == tokens[0 if first else 1 :]


def test_window_without_room_is_refused():
    with pytest.raises(ConfigError, match="window=2 leaves no room for text behind 1 special"):
        windows([1, 2, 3], 2, [0])


def test_held_out_text_costs_what_it_did_and_8_bits_cost_a_percent_at_most(tmp_path, capsys, compile_cache):
    """2.514 bits a byte in float32: of the text's beginning, where there is least before a byte."""
    target = tmp_path / "figures.json"
    arguments = ["--model-path", str(TRAINED), "--text", str(TRAINED / "held_out.txt"), "--max-bytes", "1000"]
    small = ["--max-running-requests", "4", "--chunked-prefill-size", "32", "--max-total-tokens", "1024"]
    small += ["--grammar-backend", "none", "--compile-cache-dir", compile_cache, "--log-level", "warning"]
    found = []
    for extra in ([], ["--quantization", "fp8", "--kv-cache-dtype", "fp8_e4m3"]):
        assert perplexity.main([*arguments, *small, *extra, "--window", "256", "--json", str(target)]) == 0
        (row,) = json.loads(target.read_text())
        assert (row["num_tokens"], row["num_bytes"]) == (1000, 1000)
        found.append(row["bits"] / row["num_bytes"])
        assert f"| {found[-1]:.4f} |" in capsys.readouterr().out
    assert found[0] == pytest.approx(2.5144, abs=1e-3)
    assert 1e-5 < abs(found[1] / found[0] - 1) < 0.01
    assert row["quantization"] == "fp8" and row["kv_cache_dtype"] == "float8_e4m3fn"


def test_perplexity_is_of_a_token_and_bits_are_of_a_byte():
    row = perplexity.Figures("float32", "", "float32", num_tokens=10, num_bytes=40, bits=80.0, weight_bytes=1)
    assert row.bits_per_byte == 2 and row.perplexity == 256
    worse = perplexity.Figures("float32", "fp8", "float32", 10, 40, 80 + 10 * math.log2(1.1), 1)
    assert "+10.000%" in perplexity.table([row, worse])


def test_what_the_engine_refuses_is_told_with_status_2(tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text("ab")
    assert perplexity.main(["--model-path", str(tmp_path / "none"), "--text", str(text)]) == 2
    assert "none: no such file" in capsys.readouterr().err
