"""Measures gateways side by side on this machine and prints one table, with targets beside results.

    python -m tools.bench_router                       # ours, every row
    python -m tools.bench_router --rows families killed
    python -m tools.bench_router --peer smg=VENV --peer sglang-router=VENV --peer vllm-router=VENV

A peer is the directory of a virtual environment in which it is installed (`pip install smg==1.13.0`,
`sglang-router==0.3.2`, `vllm-router==0.1.17`), or any command that serves on {port} in front of the {urls}
with {policy}. Workers are simulated (`router.bench.worker`); every measurement starts fresh ones and a fresh
gateway. Numbers of one run can be compared, numbers of two runs cannot: the machine is not the same twice.
"""

import argparse
import asyncio
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from router.bench.cases import CASES, Row
from router.bench.setup import OURS, command_of

# Beside cache_aware: policies of a peer that did better on the routing workloads.
BETTER = {"smg": ("prefix_hash", "prefix_hash --disable-worker-overload-protection")}
QUALITY = ("families", "multiturn", "multiturn128")
ROUNDS = 3  # of the overhead, gateways taking turns: the median counts
DEFAULT = "cache_aware"

Results = dict[tuple[str, str, str], Row]  # by gateway, case, policy


@dataclass(frozen=True)
class Line:
    """One line of the table: `cells(results, gateway)` are its numbers, `met` judges ours."""

    name: str
    needs: tuple[tuple[str, str], ...]  # (case, policy)
    show: Callable[[Results, str], str]
    target: str
    met: Callable[[Results], bool | None]  # None: nothing to compare with
    ours_only: bool = False


def value(results: Results, gateway: str, case: str, policy: str, name: str) -> float:
    return results.get((gateway, case, policy), {}).get(name, math.nan)


def best(results: Results, gateway: str, case: str) -> tuple[str, Row]:
    """The policy with the most requests a second, and its row."""
    rows = {p: r for (g, c, p), r in results.items() if g == gateway and c == case and p != "round_robin"}
    if not rows:
        return "", {}
    policy = max(rows, key=lambda p: rows[p].get("req/s", 0.0))
    return policy, rows[policy]


def number(name: str, case: str, policy: str, key: str, target: str, met, form: str = "{:.0f}") -> Line:
    """A line of one number."""

    def show(results: Results, gateway: str) -> str:
        found = value(results, gateway, case, policy, key)
        return "-" if math.isnan(found) else form.format(found)

    return Line(name, ((case, policy),), show, target, met)


def share_of_smg(case: str, policy: str, key: str, most: float):
    def met(results: Results) -> bool | None:
        ours, theirs = (value(results, g, case, policy, key) for g in ("ours", "smg"))
        return None if math.isnan(theirs) else ours <= most * theirs

    return met


def at_most(case: str, policy: str, key: str, most: float):
    return lambda results: value(results, "ours", case, policy, key) <= most


def throughput_met(results: Results) -> bool | None:
    key = ("overhead", "round_robin", "req/s c32, 200 ch")
    ours, smg, vllm = (value(results, g, *key) for g in ("ours", "smg", "vllm-router"))
    if math.isnan(smg) and math.isnan(vllm):
        return None
    return not ours < 2 * smg and not ours <= vllm  # a missing one is nan, and is not beaten


def routing(case: str, factor: float, least_hit: float) -> Line:
    def show(results: Results, gateway: str) -> str:
        if gateway == "ours":
            policy, row = DEFAULT, results.get((gateway, case, DEFAULT), {})
        else:
            policy, row = best(results, gateway, case)
        if not row:
            return "-"
        note = f" ({policy.replace(' --disable-worker-overload-protection', ' tuned')})"
        text = f"{row['req/s']:.0f}; {row['hit']:.3f}; {row['work max/mean']:.2f}"
        return text + (note if policy != DEFAULT else "")

    def met(results: Results) -> bool | None:
        row = results.get(("ours", case, DEFAULT), {})
        peers = {g for g, _, _ in results} - {"ours"}
        rivals = [best(results, g, case)[1].get("req/s", math.nan) for g in peers]
        good = row.get("hit", 0) >= least_hit and row.get("work max/mean", math.inf) <= 1.05
        return good and all(not row["req/s"] < factor * r for r in rivals)

    target = f">= {factor}x the best of them; >= {least_hit}; <= 1.05"
    return Line(f"`{case}`: req/s; hit; work max/mean", ((case, DEFAULT),), show, target, met)


def gain(case: str) -> Line:
    needs = ((case, DEFAULT), (case, "round_robin"))

    def show(results: Results, gateway: str) -> str:
        aware, blind = (results.get((gateway, case, p)) for p in (DEFAULT, "round_robin"))
        if not aware or not blind:
            return "-"
        speed, hits = (100 * (aware[k] / max(blind[k], 1e-9) - 1) for k in ("req/s", "hit"))
        return f"{speed:+.0f} %, {hits:+.0f} %"

    name = f"cache_aware over round_robin on `{case}`: req/s, hits"
    return Line(name, needs, show, "beside the guide's +92 %, +275 %", lambda results: None, ours_only=True)


def several(name: str, cases: Sequence[str], key: str, target: str, most: float) -> Line:
    """One number of several cases."""

    def show(results: Results, gateway: str) -> str:
        found = [value(results, gateway, c, DEFAULT, key) for c in cases]
        return "; ".join("-" if math.isnan(v) else f"{v:.0f}" for v in found)

    def met(results: Results) -> bool:
        return all(value(results, "ours", c, DEFAULT, key) <= most for c in cases)

    return Line(name, tuple((c, DEFAULT) for c in cases), show, target, met)


def pair(name: str, case: str, keys: tuple[str, str], target: str, met, policy: str = DEFAULT) -> Line:
    def show(results: Results, gateway: str) -> str:
        row = results.get((gateway, case, policy))
        return "; ".join(f"{row[k]:.0f}" for k in keys) if row else "-"

    return Line(name, ((case, policy),), show, target, met)


def slow_met(results: Results) -> bool:
    row = results[("ours", "slow", DEFAULT)]
    return row["requests"] >= 6500 and row["p99 ms"] <= 10


def aborts_met(results: Results) -> bool:
    row = results[("ours", "aborts", DEFAULT)]
    return row["lost"] <= 30 and row["lost, 2nd half"] == 0


def exact_row() -> Line:
    needs = (("exact_overhead", DEFAULT), ("exact_families", DEFAULT))

    def show(results: Results, gateway: str) -> str:
        cost, routed = (results.get((gateway, case, policy), {}) for case, policy in needs)
        if not cost or not routed:
            return "-"
        cpu = f"{cost['CPU us/req, 200 ch']:.0f}, {cost['CPU us/req, 8k ch']:.0f} us"
        return f"{cpu}; {routed['req/s']:.0f}; {routed['hit']:.3f}; {routed['work max/mean']:.2f}"

    name = "exact mode: CPU per request, 200 and 8k characters; `families`"
    return Line(name, needs, show, "(a row of its own)", lambda results: None, ours_only=True)


LINES = {
    "latency": number(
        "added latency p50 at concurrency 1, us", "overhead", "round_robin", "added p50 us, c1",
        "<= 0.7x SMG", share_of_smg("overhead", "round_robin", "added p50 us, c1", 0.7),
    ),
    "throughput": number(
        "requests/s, one process, round_robin", "overhead", "round_robin", "req/s c32, 200 ch",
        ">= 2x SMG, > vllm-router", throughput_met,
    ),
    "cpu200": number(
        "CPU us per request, 200 characters, default policy", "overhead", DEFAULT, "CPU us/req, 200 ch",
        "<= 0.4x SMG", share_of_smg("overhead", DEFAULT, "CPU us/req, 200 ch", 0.4),
    ),
    "cpu8k": number(
        "CPU us per request, 8k characters, default policy", "overhead", DEFAULT, "CPU us/req, 8k ch",
        "<= 0.55x SMG", share_of_smg("overhead", DEFAULT, "CPU us/req, 8k ch", 0.55),
    ),
    "sse": number(
        "CPU us per SSE event", "overhead", "round_robin", "CPU us/SSE event", "<= 0.5x SMG",
        share_of_smg("overhead", "round_robin", "CPU us/SSE event", 0.5), "{:.1f}",
    ),
    "exact": exact_row(),
    "families": routing("families", 1.05, 0.84),
    "multiturn": routing("multiturn", 1.2, 0.66),
    "multiturn128": routing("multiturn128", 1.2, 0.66),
    "gain-families": gain("families"),
    "gain-multiturn": gain("multiturn"),
    "killed": number(
        "a killed worker is used again after it is back, s", "killed", DEFAULT, "used again after s",
        "<= 1", at_most("killed", DEFAULT, "used again after s", 1.0), "{:.2f}",
    ),
    "slow": pair(
        "one of three turns slow: requests in 5 s; p99 ms", "slow", ("requests", "p99 ms"),
        ">= 6,500; <= 10", slow_met,
    ),
    "lost": several(
        "JSON requests failed: killed; 500s; 503s; dropped connections",
        ("killed", "errors500", "errors503", "drops"), "lost", "0", 0,
    ),
    "aborts": pair(
        "one aborts every stream: broken in 5 s; in the second half", "aborts", ("lost", "lost, 2nd half"),
        "<= 30; 0", aborts_met,
    ),
    "memory": number(
        "memory growth, 20,000 unique 4 KB prompts, MiB", "memory", DEFAULT, "growth MiB", "<= 60",
        at_most("memory", DEFAULT, "growth MiB", 60.0), "{:+.0f}",
    ),
}  # fmt: skip


async def measure(gateways: dict[str, str], names: Sequence[str], scale: float) -> Results:
    """Everything that the lines need, case by case, the gateways taking turns."""
    needs: dict[tuple[str, str], bool] = {}  # ordered; whether only ours
    for name in names:
        for need in LINES[name].needs:
            needs[need] = needs.get(need, True) and LINES[name].ours_only
    if any(case == "overhead" for case, _ in needs):
        needs.setdefault(("overhead", "round_robin"), False)
    results: Results = {}
    for (case, policy), ours_only in needs.items():
        rows: dict[tuple[str, str], list[Row]] = {}
        for _ in range(ROUNDS if case.endswith("overhead") else 1):
            for gateway, command in gateways.items():
                if ours_only and gateway != "ours":
                    continue
                more = BETTER.get(gateway, ()) if case in QUALITY and policy == DEFAULT else ()
                for tried in (policy, *more):
                    row = await _one(gateway, command, case, tried, scale)
                    rows.setdefault((gateway, tried), []).append(row)
        for (gateway, tried), found in rows.items():
            results[(gateway, case, tried)] = _median(found)
    return results


async def _one(gateway: str, command: str, case: str, policy: str, scale: float) -> Row:
    started_s = time.perf_counter()
    try:
        row = await CASES[case](command, scale, policy)
        text = "; ".join(f"{key} {value:.4g}" for key, value in row.items())
    except (TimeoutError, OSError, ZeroDivisionError) as error:
        row, text = {}, f"failed: {error!r}"
    took_s = time.perf_counter() - started_s
    print(f"{case}, {policy}, {gateway} ({took_s:.0f} s): {text}", file=sys.stderr, flush=True)
    return row


def _median(rows: list[Row]) -> Row:
    keys = {key: None for row in rows for key in row}
    return {key: statistics.median(row[key] for row in rows if key in row) for key in keys}


def table(gateways: Sequence[str], names: Sequence[str], results: Results) -> str:
    order = [*(g for g in gateways if g != "ours"), *(g for g in gateways if g == "ours")]
    lines = [f"| | {' | '.join(order)} | target | |", "|---|" + "---|" * (len(order) + 2)]
    for name in names:
        line = LINES[name]
        cells = [line.show(results, gateway) for gateway in order]
        try:
            met = line.met(results) if "ours" in gateways else None
        except KeyError:
            met = False  # ours could not be measured
        verdict = "" if met is None else "met" if met else "missed"
        lines.append(f"| {line.name} | {' | '.join(cells)} | {line.target} | {verdict} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", nargs="+", choices=LINES, default=list(LINES))
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=VENV|COMMAND")
    parser.add_argument("--without-ours", action="store_true")
    parser.add_argument("--scale", type=float, default=1.0, help="share of each case's requests or time")
    parser.add_argument("--json", metavar="FILE", help="write every number measured")
    given = parser.parse_args()
    gateways = {} if given.without_ours else {"ours": OURS}
    for peer in given.peer:
        name, _, how = peer.partition("=")
        try:
            gateways[name] = command_of(name, how)
        except ValueError as error:
            parser.error(str(error))
    started_s = time.perf_counter()
    try:
        import uvloop
    except ImportError:
        results = asyncio.run(measure(gateways, given.rows, given.scale))
    else:
        results = uvloop.run(measure(gateways, given.rows, given.scale))
    if given.json:
        with open(given.json, "w") as file:
            json.dump([[*key, row] for key, row in results.items()], file, indent=1)
    print(table(list(gateways), given.rows, results))
    print(f"\n{time.strftime('%Y-%m-%d')}, {time.perf_counter() - started_s:.0f} s")


if __name__ == "__main__":
    main()
