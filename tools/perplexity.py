"""How well a model predicts a text, and what 8-bit weights or an 8-bit KV cache change of it:

    python -m tools.perplexity --model-path models/SmolLM2-135M-Instruct --text held_out.txt --compare

The text goes through the engine as a user's prompts do, and its own prompt logprobs are added up: bits
a byte, and perplexity a token. Windows of `--window` tokens overlap by half, so that every token but
those of the first window has half a window before it. `--compare` runs the engine as it is, with 8-bit
weights, and with an 8-bit cache, one after the other; without it the server's flags (`--quantization`,
`--kv-cache-dtype`, `--dtype`, ...) say what is measured. In float32 activations stay as they are; in
bfloat16 `--quantization fp8` quantises those of large steps too, as on a GPU.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxserve.config import ConfigError, ServerConfig, add_flags
from jaxserve.offline import Engine
from jaxserve.text.tokenizer import Tokenizer, TokenizerError
from jaxserve.weights import CheckpointError

COMPARED: tuple[dict[str, str], ...] = (
    {},
    {"quantization": "fp8"},
    {"quantization": "int8"},
    {"kv_cache_dtype": "fp8_e4m3"},
    {"quantization": "fp8", "kv_cache_dtype": "fp8_e4m3"},
)
BATCH = 16  # windows that are in the engine at a time


@dataclass(frozen=True)
class Figures:
    """Of one engine on one text."""

    dtype: str
    quantization: str
    kv_cache_dtype: str
    num_tokens: int  # that were predicted
    num_bytes: int  # they stand for
    bits: float
    weight_bytes: int

    @property
    def bits_per_byte(self) -> float:
        return self.bits / self.num_bytes

    @property
    def perplexity(self) -> float:
        return 2 ** (self.bits / self.num_tokens)


@dataclass(frozen=True)
class Window:
    """A prompt, and how many of its first tokens are context only."""

    token_ids: list[int]
    num_context: int


def windows(token_ids: Sequence[int], size: int, first: Sequence[int] = ()) -> list[Window]:
    """Every token is predicted once, but for the very first of a text that nothing comes before.

    Args:
        first: what the tokenizer puts before a text, such as one bos.
    """
    room = size - len(first)
    if room < 2:
        raise ConfigError(f"window={size} leaves no room for text behind {len(first)} special tokens")
    step = room // 2
    out = [Window([*first, *token_ids[:room]], max(1, len(first)))]
    done = room
    while done < len(token_ids):
        end = min(done + step, len(token_ids))
        begin = end - room
        out.append(Window([*first, *token_ids[begin:end]], len(first) + done - begin))
        done = end
    return out


def measure(engine: Engine, prompts: Sequence[Window], tokenizer: Tokenizer) -> Figures:
    nats, num_tokens, num_bytes = 0.0, 0, 0
    for at in range(0, len(prompts), BATCH):
        batch = prompts[at : at + BATCH]
        replies = engine.generate(
            input_ids=[window.token_ids for window in batch],
            sampling_params={"max_new_tokens": 1, "temperature": 0},
            return_logprob=True,
            logprob_start_len=0,
        )
        assert isinstance(replies, list)
        for window, reply in zip(batch, replies, strict=True):
            scored = reply["meta_info"]["input_token_logprobs"][window.num_context :]
            nats -= sum(entry[0] for entry in scored)
            num_tokens += len(scored)
            predicted = window.token_ids[window.num_context :]
            num_bytes += sum(len(tokenizer.token_bytes(token)) for token in predicted)
    info = engine.info
    return Figures(
        dtype=info.dtype,
        quantization=info.quantization,
        kv_cache_dtype=info.kv_cache_dtype,
        num_tokens=num_tokens,
        num_bytes=num_bytes,
        bits=nats / math.log(2),
        weight_bytes=info.weight_bytes,
    )


def run(text: str, window: int, server: dict[str, Any]) -> Figures:
    """Raises ConfigError or CheckpointError, as the engine does."""
    options = {"context_length": window + 1, **server, "skip_tokenizer_init": True}
    with Engine(**options) as engine:
        path = server.get("tokenizer_path") or engine.info.tokenizer_dir
        try:
            tokenizer = Tokenizer.from_dir(path)
        except TokenizerError as error:
            raise ConfigError(str(error)) from error
        first = tokenizer.encode("")
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        if len(token_ids) < 2:
            raise ConfigError("text: two tokens at least are needed, to predict one")
        return measure(engine, windows(token_ids, window, first), tokenizer)


def table(rows: Sequence[Figures]) -> str:
    """Markdown; changes are against the first row."""
    lines = [
        "| dtype | weights | KV | weights, MB | bits a byte | change | perplexity a token | change |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        bits, perplexity = row.bits_per_byte, row.perplexity
        more_bits = bits / rows[0].bits_per_byte - 1
        more_perplexity = perplexity / rows[0].perplexity - 1
        changes = ("", "") if row is rows[0] else (f"{more_bits:+.3%}", f"{more_perplexity:+.3%}")
        lines.append(
            f"| {row.dtype} | {row.quantization or 'as they are'} | {row.kv_cache_dtype} "
            f"| {row.weight_bytes / 1e6:.1f} | {bits:.4f} | {changes[0]} | {perplexity:.4f} | {changes[1]} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.perplexity",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 file")
    parser.add_argument("--max-bytes", type=int, help="of the text; default: all of it")
    parser.add_argument("--window", type=int, default=512, help="tokens of a prompt (default %(default)s)")
    parser.add_argument("--compare", action="store_true", help="run 8-bit weights and cache too")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    add_flags(parser, ServerConfig)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    text_path, target = given.pop("text"), given.pop("json", None)
    max_bytes, window, compare = given.pop("max_bytes", None), given.pop("window"), given.pop("compare")
    try:
        text = text_path.read_bytes()[:max_bytes].decode("utf-8", "ignore")
        rows = [run(text, window, {**given, **change}) for change in (COMPARED if compare else ({},))]
    except (ConfigError, CheckpointError, OSError) as error:
        print(f"perplexity: {error}", file=sys.stderr)
        return 2
    print(f"{rows[0].num_tokens:,} tokens, {rows[0].num_bytes:,} bytes of {text_path}, windows of {window}")
    print(table(rows))
    if target:
        target.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
