"""`python -m tools.profile_step --model-path M --batch B`: where a decode step's time goes on the device.

Runs B requests under jax's profiler and prints, a step: the time from step to step, the time the
device was busy, and the kernels that took most, with their counts.
"""

import argparse
import collections
import gzip
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxserve.config import ServerConfig, add_flags
from jaxserve.offline import Engine
from tools.bench_offline import make_decode


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.profile_step", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--batch", default="1,64", help="batch sizes (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=48, help="decode steps to trace (default %(default)s)")
    parser.add_argument("--top", type=int, default=16, help="kernels to print (default %(default)s)")
    add_flags(parser, ServerConfig)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    batches, tokens, top = (
        [int(b) for b in given.pop("batch").split(",")],
        given.pop("tokens"),
        given.pop("top"),
    )
    with Engine(**given, skip_tokenizer_init=True) as engine:
        for batch in batches:
            requests = [(prompt, tokens) for prompt, _ in make_decode(batch)]
            run(engine, requests)
            steps = -engine.stats()["steps"]
            with tempfile.TemporaryDirectory() as folder:
                begin_s = time.perf_counter()
                with jax.profiler.trace(folder, create_perfetto_trace=True):
                    run(engine, requests)
                    seconds = time.perf_counter() - begin_s
                steps += engine.stats()["steps"]
                kernels = read_kernels(Path(folder))
            report(f"batch {batch}", kernels, steps, seconds, top)
    return 0


def run(engine: Engine, requests: list[tuple[list[int], int]]) -> None:
    engine.flush_cache()
    engine.generate(
        input_ids=[prompt for prompt, _ in requests],
        sampling_params=[{"temperature": 0, "max_new_tokens": n, "ignore_eos": True} for _, n in requests],
    )


def read_kernels(folder: Path) -> list[tuple[str, float, float]]:
    """(name, start us, duration us) of every kernel in a trace, by start."""
    [file] = folder.rglob("perfetto_trace.json.gz")
    events: list[dict[str, Any]] = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    threads = {
        (e["pid"], e["tid"]): e["args"]["name"]
        for e in events
        if e.get("name") == "thread_name" and "args" in e
    }
    return sorted(
        (
            (e["name"], e["ts"], e["dur"])
            for e in events
            if e.get("ph") == "X"
            and "device" in names.get(e["pid"], "").lower()
            and "stream" in threads.get((e["pid"], e["tid"]), "").lower()
        ),
        key=lambda kernel: kernel[1],
    )


def report(title: str, kernels: list[tuple[str, float, float]], steps: int, seconds: float, top: int) -> None:
    total: dict[str, float] = collections.defaultdict(float)
    count: dict[str, int] = collections.Counter()
    for name, _, duration in kernels:
        name = re.sub(r"[._]\d+(_\d+)*$", "", name)
        total[name] += duration
        count[name] += 1
    busy_ms = _covered(kernels) / 1e3 / steps
    print(
        f"== {title}: {steps} steps, {seconds / steps * 1e3:.3f} ms a step, device busy {busy_ms:.3f} ms, "
        f"{len(kernels) / steps:.0f} kernels a step",
        flush=True,
    )
    for name in sorted(total, key=lambda n: -total[n])[:top]:
        print(f"  {total[name] / steps:9.1f} us  {count[name] / steps:7.1f} x  {name[:100]}", flush=True)


def _covered(kernels: Iterable[tuple[str, float, float]]) -> float:
    """Microseconds in which at least one kernel ran."""
    covered, end = 0.0, 0.0
    for _, start, duration in kernels:
        covered += max(0.0, start + duration - max(start, end))
        end = max(end, start + duration)
    return covered


if __name__ == "__main__":
    sys.exit(main())
