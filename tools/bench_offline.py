"""`python -m tools.bench_offline --model-path M`: decode, prefill and mixed throughput, without HTTP.

Runs the rows that engines are compared by, each on the same seeded token ids everywhere:

- decode: B requests of 128 tokens in, 256 out, at once; milliseconds a step and tokens a second;
- prefill: N prompts of 4096 tokens, one token out; tokens a second;
- mix: 256 requests of lognormal lengths at once (about 55k tokens in, 50k out);
- shared: 128 requests over 8 prefixes of 1,024 tokens, with the prefix cache on and off;
- text: B requests of 128 tokens of `--text`, 128 out, for models with real weights and their tokenizer:
  what speculative decoding (`--speculative-algorithm`) brings depends on what is written.

Every run starts from an empty prefix cache. Weights may be random (`--load-format dummy`): speed does
not depend on them, except for the routing of experts. Random routers spread tokens over all experts, as
trained ones do; `--same-experts` sends every token to the same ones, which reads a fraction of the bytes:
for comparing with an engine whose random weights do that.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.config import ServerConfig, add_flags
from jaxserve.layers.moe import MoE
from jaxserve.offline import Engine
from jaxserve.text.tokenizer import Tokenizer

LOWEST_ID, HIGHEST_ID = 1000, 30000  # valid in every vocabulary that is benchmarked
Request = tuple[list[int], int]  # prompt, tokens out


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_offline", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--rows", default="decode,prefill,mix,shared", help="which benchmarks (default %(default)s)"
    )
    parser.add_argument(
        "--batches", default="1,8,32,64,128,256", help="batch sizes of decode (default %(default)s)"
    )
    parser.add_argument("--text", type=Path, help="UTF-8 file for the row `text`")
    parser.add_argument("--same-experts", action="store_true", help="all tokens choose the same experts")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    add_flags(parser, ServerConfig)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    rows, batches = given.pop("rows").split(","), [int(b) for b in given.pop("batches").split(",")]
    target, same_experts, text = given.pop("json", None), given.pop("same_experts"), given.pop("text", None)
    if ("text" in rows) != (text is not None):
        parser.error("--text FILE and the row text go together")
    begin_s = time.monotonic()
    with Engine(**given, skip_tokenizer_init=True) as engine:
        if same_experts:
            level_routers(engine)
        bench = Bench(engine)
        info = engine.info
        bench.note(
            "start",
            device=info.device_kind, model=info.model_path, dtype=info.dtype,
            kv_tokens=info.max_total_num_tokens,
            seconds=round(time.monotonic() - begin_s, 1), load_s=round(info.load_weights_s, 1),
            compile_s=round(info.compile_s, 1),
        )  # fmt: skip
        token_ids = Tokenizer.from_dir(info.tokenizer_dir).encode(text.read_text()) if text else []
        bench.run(make_text(token_ids, 1) if text else make_decode(8), "warm-up", decode_figures)
        if "decode" in rows:
            for batch in batches:
                if batch <= info.max_running_requests:
                    bench.run(make_decode(batch), f"decode B={batch}", decode_figures)
        if "prefill" in rows:
            for count in (1, 16):
                bench.run(
                    make_prefill(count, min(4096, info.max_req_len - 1)), f"prefill {count}", prefill_figures
                )
        if "mix" in rows:
            bench.run(make_mix(), "mix", mix_figures)
        if "shared" in rows:
            bench.run(make_shared(), "shared", mix_figures)
        if text:
            for batch in batches:
                bench.run(make_text(token_ids, batch), f"text B={batch}", decode_figures)
        stats = engine.stats()
        bench.note(
            "end", compiles_after_ready=stats["compiles_after_ready"], retractions=stats["retractions"]
        )
    if target:
        target.write_text(json.dumps(bench.figures, indent=1))
    return 0


def level_routers(engine: Engine) -> None:
    """Make every expert's score the same for every token: ties go to those of the lowest numbers."""
    runner = engine._engine.runner
    model = runner._model.call(runner._leaves)
    routers = {id(node.router.get_raw_value()) for _, node in nnx.iter_graph(model) if isinstance(node, MoE)}
    assert routers, "the model has no experts"
    runner._leaves[:] = [jnp.zeros_like(leaf) if id(leaf) in routers else leaf for leaf in runner._leaves]


class Bench:
    """Runs request lists on an engine and prints one line of figures for each."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.figures: list[dict[str, Any]] = []

    def run(self, requests: list[Request], name: str, figures: Callable[..., dict[str, Any]]) -> None:
        self.engine.flush_cache()
        begin = self.engine.stats()
        begin_s = time.perf_counter()
        replies = self.engine.generate(
            input_ids=[prompt for prompt, _ in requests],
            sampling_params=[
                {"temperature": 0, "max_new_tokens": out, "ignore_eos": True} for _, out in requests
            ],
        )
        seconds = time.perf_counter() - begin_s
        end = self.engine.stats()
        assert isinstance(replies, list)
        for (_, out), reply in zip(requests, replies):
            assert len(reply["output_ids"]) == out, (name, out, reply["meta_info"]["finish_reason"])
        counted = {
            name: sum(end[name]) - sum(begin[name])
            for name in ("cached_tokens", "spec_drafted", "spec_accepted")
            if name == "cached_tokens" or end[name] != begin[name]
        }
        self.note(name, **figures(requests, seconds, end["steps"] - begin["steps"]), **counted)

    def note(self, name: str, **values: Any) -> None:
        self.figures.append({"name": name, **values})
        print(f"{name:14s} " + "  ".join(f"{k}={v}" for k, v in values.items()), flush=True)


# ---- requests ----


def make_decode(batch: int) -> list[Request]:
    rng = np.random.default_rng(batch)
    return [(_ids(rng, 128), 256) for _ in range(batch)]


def make_prefill(count: int, length: int) -> list[Request]:
    rng = np.random.default_rng(count)
    return [(_ids(rng, length), 1) for _ in range(count)]


def make_mix(count: int = 256) -> list[Request]:
    rng = np.random.default_rng(0)
    prompts, outs = _lengths(rng, 120, 1.1, count, 2048), _lengths(rng, 140, 0.9, count, 1024)
    rng.exponential(1.0, count)  # arrival times, which the HTTP benchmark uses; drawn to keep the ids equal
    return [(_ids(rng, int(n)), int(out)) for n, out in zip(prompts, outs)]


def make_shared(groups: int = 8, per_group: int = 16, prefix: int = 1024) -> list[Request]:
    """Round robin over the groups, the worst order for a small cache."""
    rng = np.random.default_rng(1)
    prefixes = [_ids(rng, prefix) for _ in range(groups)]
    return [
        (prefixes[group] + _ids(rng, int(rng.integers(32, 129))), 64)
        for _ in range(per_group)
        for group in range(groups)
    ]


def make_text(token_ids: list[int], batch: int, length: int = 128) -> list[Request]:
    """Parts of a text that begin evenly spread over it.

    Raises ValueError when there are not that many different beginnings.
    """
    spacing = (len(token_ids) - length) // batch
    if spacing < 1:
        raise ValueError(f"a text of {len(token_ids)} tokens is too short for {batch} parts of {length}")
    return [(token_ids[at * spacing : at * spacing + length], 128) for at in range(batch)]


def _ids(rng: np.random.Generator, count: int) -> list[int]:
    return rng.integers(LOWEST_ID, HIGHEST_ID, count).tolist()


def _lengths(rng: np.random.Generator, median: float, sigma: float, count: int, most: int) -> np.ndarray:
    return np.clip(np.rint(rng.lognormal(np.log(median), sigma, count)), 4, most).astype(int)


# ---- figures ----


def decode_figures(requests: list[Request], seconds: float, steps: int) -> dict[str, Any]:
    out = requests[0][1]
    return {
        "ms_per_step": round(seconds / out * 1e3, 3),
        "tok_s": round(len(requests) * out / seconds, 1),
        "steps": steps,
    }


def prefill_figures(requests: list[Request], seconds: float, steps: int) -> dict[str, Any]:
    tokens = sum(len(prompt) for prompt, _ in requests)
    return {"tok_s": round(tokens / seconds), "ms": round(seconds * 1e3, 1), "steps": steps}


def mix_figures(requests: list[Request], seconds: float, steps: int) -> dict[str, Any]:
    tokens_in, tokens_out = sum(len(prompt) for prompt, _ in requests), sum(out for _, out in requests)
    return {
        "seconds": round(seconds, 2),
        "out_tok_s": round(tokens_out / seconds),
        "total_tok_s": round((tokens_in + tokens_out) / seconds),
        "req_s": round(len(requests) / seconds, 2),
        "tokens_in": tokens_in,
        "tokens_out": tokens_out,
        "steps": steps,
    }


if __name__ == "__main__":
    sys.exit(main())
