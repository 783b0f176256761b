"""`python -m tools.profile_step --model-path M --batch B`: where a step's time goes on the device.

Runs B requests until all of them decode, traces a while with jax's profiler, and prints, a step: the
time from step to step, the time the device was busy, and the kernels that took most, with their counts.
`--prompts 4x4096,256x128` does the same for the steps of prompts, one token out: N prompts of L tokens.
Times from step to step are longer than without the profiler, under which XLA records no CUDA graphs.
"""

import argparse
import collections
import gzip
import json
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from jaxserve.config import ServerConfig, add_flags
from jaxserve.offline import Engine
from tools.bench_offline import Request, make_decode, make_prefill


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.profile_step", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--batch", default="1,64", help="batch sizes (default %(default)s)")
    parser.add_argument(
        "--prompts", type=prompts_of, default="", help="prompts at once, such as 4x4096 (default: none)"
    )
    parser.add_argument("--seconds", type=float, default=0.4, help="to trace (default %(default)s)")
    parser.add_argument("--top", type=int, default=16, help="kernels to print (default %(default)s)")
    add_flags(parser, ServerConfig)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    batches = [int(b) for b in given.pop("batch").split(",") if b]
    prompts, seconds, top = given.pop("prompts"), given.pop("seconds"), given.pop("top")
    with Engine(**given, skip_tokenizer_init=True) as engine:
        for batch in batches:
            with decoding(engine, batch), traced(engine) as trace:
                time.sleep(seconds)
            report(f"batch {batch}", trace, top)
        for count, length in prompts:
            computing = make_prefill(count, length)
            compute(engine, computing)
            with traced(engine) as trace:
                compute(engine, computing)
            report(f"{count} prompts of {length}", trace, top)
    return 0


def prompts_of(text: str) -> list[tuple[int, int]]:
    """[(4, 4096), ...] of "4x4096,...". Raises ArgumentTypeError."""
    found = [re.fullmatch(r"(\d+)x(\d+)", part) for part in text.split(",") if part]
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} must be COUNTxLENGTH, such as 4x4096, joined by commas")
    return [(int(match[1]), int(match[2])) for match in found if match]


@dataclass
class Trace:
    """What ran on the devices in some steps."""

    kernels: list[tuple[str, float, float]] = field(default_factory=list)  # (name, start us, duration us)
    steps: int = 0
    seconds: float = 0.0


@contextmanager
def traced(engine: Engine) -> Iterator[Trace]:
    """Filled when the block ends and the engine, where it still works, is told to stop."""
    trace = Trace()
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder, create_perfetto_trace=True)
        steps, begin_s = engine.stats()["steps"], time.perf_counter()
        try:
            yield trace
        finally:
            # The profiler must not be taken away from a working GPU: that can kill the context.
            engine.abort()
            trace.steps = engine.stats()["steps"] - steps
            trace.seconds = time.perf_counter() - begin_s
            jax.profiler.stop_trace()
        trace.kernels = read_kernels(Path(folder))


def compute(engine: Engine, requests: list[Request]) -> None:
    engine.flush_cache()
    params = {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True}
    engine.generate(input_ids=[prompt for prompt, _ in requests], sampling_params=params)


@contextmanager
def decoding(engine: Engine, batch: int) -> Iterator[None]:
    """B requests that decode for as long as the block runs."""
    prompts = [prompt for prompt, _ in make_decode(batch)]
    length = min(8192, engine.info.max_total_num_tokens // batch, engine.info.max_req_len) - 130
    params = {"temperature": 0, "max_new_tokens": length, "ignore_eos": True}
    engine.flush_cache()
    thread = threading.Thread(
        target=engine.generate, kwargs={"input_ids": prompts, "sampling_params": params, "rid": "profile"}
    )
    thread.start()
    done = engine.stats()["generation_tokens"][0]
    while engine.stats()["generation_tokens"][0] - done < 8 * batch:
        assert thread.is_alive(), "the requests ended before they could be traced"
        time.sleep(0.05)
    try:
        yield
    finally:
        engine.abort()
        thread.join()


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


def report(title: str, trace: Trace, top: int) -> None:
    kernels, steps, seconds = trace.kernels, max(trace.steps, 1), trace.seconds
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
