"""How a running server answers: `python -m tools.bench_serve --url http://localhost:30000`.

Streams `/generate` as clients do and reports time to the first token (TTFT), time a token after it
(TPOT), gaps between tokens (ITL), whole latency, and throughput, as mean and percentiles.

- `--request-rate R` is an open loop: requests arrive as a Poisson process of R a second, whether or not
  earlier ones are answered, and times count from a request's arrival, not from when it could be sent.
- Without it a closed loop: `--concurrency C` clients, each of which sends its next request when its last
  one has ended.

Several rates or concurrencies, separated by commas, make a curve. Each point is measured `--repeats`
times, with other arrivals, after requests that do not count (`--warm-up`). Prompts are token ids, seeded:
the same everywhere. `--workload mix` and `shared` are those of `tools.bench_offline`, the same requests
in every run, so each run starts with an empty prefix cache (`/flush_cache`).
"""

import argparse
import asyncio
import itertools
import json
import math
import random
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.serve_client import Client, Timing
from tools.serve_plot import plot

PERCENTILES = (50, 90, 99)
Request = tuple[list[int], int]  # prompt, tokens out


@dataclass(frozen=True)
class Point:
    """One load: requests a second (open loop), or clients (closed loop)."""

    rate: float | None = None
    concurrency: int | None = None

    @property
    def name(self) -> str:
        return f"{self.rate:g} req/s" if self.rate is not None else f"{self.concurrency} clients"


# ---- what is sent ----


def workload(
    name: str, count: int, input_len: int, output_len: int, seed: int, max_token_id: int = 29999
) -> list[Request]:
    if name == "random":
        rng, least = random.Random(seed), min(1000, max_token_id // 4)  # special tokens often come first
        prompts = [[rng.randint(least, max_token_id) for _ in range(input_len)] for _ in range(count)]
        return [(prompt, output_len) for prompt in prompts]
    from tools.bench_offline import make_mix, make_shared  # imports jax, which the client does not need

    requests = make_mix(count) if name == "mix" else make_shared()
    return list(itertools.islice(itertools.cycle(requests), count))


def body_of(request: Request, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`more`: sampling parameters beside, or in place of, the greedy ones."""
    prompt, max_new_tokens = request
    params = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
    return {"input_ids": prompt, "sampling_params": {**params, **(more or {})}}


def arrivals(rate: float, count: int, seed: int) -> Iterator[float]:
    """Seconds after the start, of a Poisson process."""
    rng, at = random.Random(seed), 0.0
    for _ in range(count):
        yield at
        at += rng.expovariate(rate)


async def run(
    client: Client,
    requests: Sequence[Request],
    point: Point,
    seed: int,
    more: Mapping[str, Any] | None = None,
) -> list[Timing]:
    """Send all requests at one load; timings in the order of `requests`. `more`: see `body_of`."""
    bodies = [body_of(request, more) for request in requests]
    if point.rate is None:
        return await _closed_loop(client, bodies, point.concurrency or 1)
    begin_s = time.perf_counter()

    async def one(body: dict[str, Any], at_s: float) -> Timing:
        await asyncio.sleep(begin_s + at_s - time.perf_counter())
        return await client.generate(body, due_s=begin_s + at_s)

    tasks = zip(bodies, arrivals(point.rate, len(bodies), seed))
    return await asyncio.gather(*(one(body, at_s) for body, at_s in tasks))


async def _closed_loop(client: Client, bodies: Sequence[dict[str, Any]], concurrency: int) -> list[Timing]:
    timings: list[Timing | None] = [None] * len(bodies)
    queue = iter(enumerate(bodies))  # shared: who is free takes the next

    async def user() -> None:
        for number, body in queue:
            timings[number] = await client.generate(body)

    await asyncio.gather(*(user() for _ in range(concurrency)))
    return [timing for timing in timings if timing is not None]


# ---- what is reported ----


def summary(timings: Sequence[Timing]) -> dict[str, Any]:
    """Figures of one run. Milliseconds, tokens and requests a second; failures are counted apart."""
    good = [timing for timing in timings if timing.is_good]
    failed = [timing for timing in timings if not timing.is_good]
    out: dict[str, Any] = {"requests": len(timings), "failed": len(failed)}
    if failed:
        out["first_failure"] = f"status {failed[0].status}: {failed[0].error}"
    if not good:
        return out
    span_s = max(t.ended_s for t in timings) - min(t.due_s for t in timings)
    prompt_tokens = sum(t.prompt_tokens for t in good)
    out |= {
        "seconds": span_s,
        "requests_per_s": len(good) / span_s,
        "output_tokens_per_s": sum(t.num_tokens for t in good) / span_s,
        "total_tokens_per_s": sum(t.num_tokens + t.prompt_tokens for t in good) / span_s,
        "cached_share": sum(t.cached_tokens for t in good) / prompt_tokens,
        "ttft_ms": spread([t.ttft_s * 1e3 for t in good]),
        "tpot_ms": spread([t.tpot_s * 1e3 for t in good if t.tpot_s is not None]),
        "itl_ms": spread([gap * 1e3 for t in good for gap in t.itl_s]),
        "e2e_ms": spread([t.e2e_s * 1e3 for t in good]),
    }
    return out


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean and percentiles, each the smallest value that so many percent do not exceed."""
    if not values:
        return None
    ordered = sorted(values)
    ranks = {f"p{p}": ordered[max(0, math.ceil(p / 100 * len(ordered)) - 1)] for p in PERCENTILES}
    return {"mean": sum(ordered) / len(ordered), **ranks, "max": ordered[-1]}


COLUMNS = ("requests_per_s", "output_tokens_per_s", "ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")


def table(points: Sequence[dict[str, Any]]) -> str:
    head = f"{'load':>14} {'run':>3} {'failed':>6} {'req/s':>8} {'out tok/s':>9}"
    head += "".join(f" {f'{name} p50/p90/p99, ms':>26}" for name in ("TTFT", "TPOT", "ITL", "E2E"))
    lines = [head]
    for point in points:
        for number, figures in enumerate(point["runs"], 1):
            line = f"{point['load']:>14} {number:>3} {figures['failed']:>6}"
            for name in COLUMNS:
                value = figures.get(name)
                if name.endswith("_ms"):
                    cells = "-" if not value else " / ".join(f"{value[f'p{p}']:.1f}" for p in PERCENTILES)
                    line += f" {cells:>26}"
                else:
                    line += f" {0 if value is None else value:>{8 if name == COLUMNS[0] else 9}.1f}"
            lines.append(line)
            if "first_failure" in figures:
                lines.append(f"{'':>14}     first failure: {figures['first_failure']}")
    return "\n".join(lines)


def flush_cache(url: str, api_key: str | None) -> None:
    """Empty the prefix cache, so that a run's prompts are not answered from the one before.

    A server that cannot is measured all the same, with a line about it on stderr.
    """
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    request = urllib.request.Request(f"{url.rstrip('/')}/flush_cache", b"", headers)
    try:
        urllib.request.urlopen(request, timeout=60).close()
    except OSError as error:
        print(f"the prefix cache is not emptied between runs: {error}", file=sys.stderr)


async def measure(args: argparse.Namespace, points: Sequence[Point]) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    client = Client(args.url, args.api_key)
    try:
        if args.warm_up:
            sizes = args.input_len, args.output_len
            warm = workload("random", args.warm_up, *sizes, args.seed + 7919, args.max_token_id)
            await run(client, warm, Point(concurrency=min(args.warm_up, 8)), args.seed, args.sampling_params)
        for point in points:
            runs = []
            for repeat in range(args.repeats):
                seed = args.seed + 1000 * len(out) + repeat
                sizes = args.num_requests, args.input_len, args.output_len
                requests = workload(args.workload, *sizes, seed, args.max_token_id)
                await asyncio.to_thread(flush_cache, args.url, args.api_key)
                runs.append(summary(await run(client, requests, point, seed, args.sampling_params)))
            out.append(
                {"load": point.name, "rate": point.rate, "concurrency": point.concurrency, "runs": runs}
            )
            print(table(out[-1:]), flush=True)
    finally:
        client.close()
    return out


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_serve", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--url", default="http://127.0.0.1:30000", help="server or gateway (default %(default)s)"
    )
    parser.add_argument("--api-key", help="bearer token")
    load = parser.add_mutually_exclusive_group()
    load.add_argument("--request-rate", help="open loop: requests a second, several separated by commas")
    load.add_argument("--concurrency", help="closed loop: clients, several separated by commas (default 8)")
    parser.add_argument("--workload", choices=("random", "mix", "shared"), default="random")
    parser.add_argument("--num-requests", type=int, default=128, help="of one run (default %(default)s)")
    parser.add_argument("--input-len", type=int, default=256, help="of random prompts (default %(default)s)")
    parser.add_argument("--output-len", type=int, default=128, help="of random ones (default %(default)s)")
    parser.add_argument("--max-token-id", type=int, default=29999, help="of random prompts")
    parser.add_argument(
        "--sampling-params",
        type=_sampling_params,
        help='more of each request, as JSON: {"temperature": 1, "json_schema": {"type": "array"}}',
    )
    parser.add_argument("--warm-up", type=int, default=8, help="requests before (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each point (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="write a curve of latency over throughput here, as SVG")
    args = parser.parse_args(argv)
    try:
        points = _points(args.request_rate, args.concurrency)
        for name in ("num_requests", "input_len", "output_len", "max_token_id", "repeats"):
            if getattr(args, name) < 1:
                raise ValueError(f"{name}={getattr(args, name)} is too small; 1 is the least")
    except ValueError as error:
        parser.error(str(error))
    out = asyncio.run(measure(args, points))
    if args.json:
        settings = {name: str(value) for name, value in vars(args).items() if name != "api_key"}
        args.json.write_text(json.dumps({"settings": settings, "points": out}, indent=1))
    if args.plot:
        args.plot.write_text(plot(out, f"{args.workload} on {args.url}"))
    return 1 if any(figures["failed"] for point in out for figures in point["runs"]) else 0


def _sampling_params(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def _points(rates: str | None, concurrencies: str | None) -> list[Point]:
    if rates is not None:
        values = [float(rate) for rate in rates.split(",")]
        if any(not 0 < rate < math.inf for rate in values):
            raise ValueError(f"request_rate={rates} must be positive numbers")
        return [Point(rate=rate) for rate in values]
    counts = [int(count) for count in (concurrencies or "8").split(",")]
    if any(count < 1 for count in counts):
        raise ValueError(f"concurrency={concurrencies} must be positive numbers")
    return [Point(concurrency=count) for count in counts]


if __name__ == "__main__":
    sys.exit(main())
