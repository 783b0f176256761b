"""What a decoding dp rank feels of another rank's prompts:

    python -m tools.bench_neighbours --model tests/golden/llama --dp-size 4 --chunks 32,64,128

For each chunk size one engine, of which rank 1 decodes: first with idle neighbours, then while rank 0
computes prompts one after the other. A token comes in every step either way; a step with a chunk in it is
longer, by the chunk and not by the prompt. Prints the time between rank 1's tokens, in milliseconds.
"""

import argparse
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

import jaxserve
from jaxserve.config import ConfigError
from jaxserve.weights import CheckpointError

DECODING, BUSY = 1, 0  # ranks


@dataclass(frozen=True)
class Gaps:
    """Between tokens, in ms."""

    values: list[float]

    def __str__(self) -> str:
        p50, p99 = np.percentile(self.values, (50, 99))
        return f"{p50:>9.2f}{p99:>9.2f}{max(self.values):>9.2f}"


def decode(engine: jaxserve.Engine, num_tokens: int) -> Gaps:
    """One sequence on the decoding rank, from its second token on."""
    params = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
    came_s = [
        time.perf_counter()
        for _ in engine.generate(
            input_ids=[5, 6, 7], sampling_params=params, stream=True, routed_dp_rank=DECODING
        )
    ]
    return Gaps([1e3 * (after - before) for before, after in pairwise(came_s[1:])])


def decode_beside_prompts(engine: jaxserve.Engine, num_tokens: int, prompt_len: int) -> tuple[Gaps, int]:
    """As `decode`, and how many prompts the other rank computed meanwhile."""
    stop, count = threading.Event(), 0

    def keep_busy() -> None:
        nonlocal count
        while not stop.is_set():
            prompt = [3 + (7 * count + i) % 90 for i in range(prompt_len)]  # none begins as another
            engine.generate(input_ids=prompt, sampling_params={"max_new_tokens": 1}, routed_dp_rank=BUSY)
            count += 1

    thread = threading.Thread(target=keep_busy)
    thread.start()
    try:
        return decode(engine, num_tokens), count
    finally:
        stop.set()
        thread.join()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_neighbours",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="directory with a config.json, or such a file")
    parser.add_argument("--dp-size", type=int, default=2)
    parser.add_argument("--tp", type=int, help="devices; by default as many as ranks")
    parser.add_argument("--ep", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--chunks", default="32,128", help="prompt tokens of a step, separated by commas")
    parser.add_argument("--prompt", type=int, default=384)
    parser.add_argument("--tokens", type=int, default=100)
    args = parser.parse_args(argv)
    options: dict[str, Any] = {
        "tp": args.tp or args.dp_size,
        "dp_size": args.dp_size,
        "ep": args.ep,
        "enable_dp_attention": True,
        "device": args.device,
        "dtype": args.dtype,
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_running_requests": 8,
        "max_total_tokens": 8192,
        "disable_radix_cache": True,
        "log_level": "error",
    }
    try:
        print(f"{'':>8}{'idle neighbours':>27}   {'a neighbour computes prompts':>27}")
        print(f"{'chunk':>8}{'p50':>9}{'p99':>9}{'max':>9}   {'p50':>9}{'p99':>9}{'max':>9}{'prompts':>9}")
        for chunk in map(int, args.chunks.split(",")):
            with jaxserve.Engine(args.model, chunked_prefill_size=chunk, **options) as engine:
                decode(engine, args.tokens)  # warm
                idle = decode(engine, args.tokens)
                beside, count = decode_beside_prompts(engine, args.tokens, args.prompt)
            print(f"{chunk:>8}{idle}   {beside}{count:>9}", flush=True)
    except (ConfigError, CheckpointError) as error:
        print(f"bench_neighbours: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
