"""The benchmark's table judges what was measured, and no more than that."""

import pytest

from tools.bench_router import LINES, table

FAST = {"req/s c32, 200 ch": 20000.0, "added p50 us, c1": 100.0, "CPU us/req, 200 ch": 40.0}
SLOW = {"req/s c32, 200 ch": 8000.0, "added p50 us, c1": 200.0, "CPU us/req, 200 ch": 120.0}
AWARE = {"req/s": 900.0, "hit": 0.85, "work max/mean": 1.02}


def verdict(line: str, results: dict) -> str:
    gateways = list(dict.fromkeys(gateway for gateway, _, _ in results))
    return table(gateways, [line], results).splitlines()[2].split("|")[-2].strip()


@pytest.mark.parametrize(
    "line, results, wanted",
    [
        ("throughput", {"ours": FAST, "smg": SLOW}, "met"),
        ("throughput", {"ours": FAST, "smg": SLOW, "vllm-router": FAST}, "missed"),
        ("throughput", {"ours": FAST}, ""),
        ("latency", {"ours": FAST, "smg": SLOW}, "met"),
        ("latency", {"ours": SLOW, "smg": FAST}, "missed"),
        ("latency", {"ours": {}, "smg": FAST}, "missed"),
    ],
)
def test_overhead_is_judged_against_the_peers_that_were_measured(line, results, wanted):
    assert verdict(line, {(g, "overhead", "round_robin"): row for g, row in results.items()}) == wanted


@pytest.mark.parametrize("rival, wanted", [(850.0, "met"), (890.0, "missed")])
def test_routing_must_beat_the_best_policy_of_the_best_peer(rival, wanted):
    results = {
        ("ours", "families", "cache_aware"): AWARE,
        ("smg", "families", "cache_aware"): AWARE | {"req/s": 300.0},
        ("smg", "families", "prefix_hash"): AWARE | {"req/s": rival},
    }
    assert verdict("families", results) == wanted
    assert "(prefix_hash)" in table(["smg", "ours"], ["families"], results)


def test_lost_requests_of_any_case_are_a_miss_and_so_is_a_case_that_failed():
    rows = {("ours", case, "cache_aware"): {"lost": 0.0} for case, _ in LINES["lost"].needs}
    assert verdict("lost", rows) == "met"
    assert verdict("lost", rows | {("ours", "drops", "cache_aware"): {"lost": 1.0}}) == "missed"
    assert verdict("lost", rows | {("ours", "drops", "cache_aware"): {}}) == "missed"
    assert verdict("slow", {("ours", "slow", "cache_aware"): {}}) == "missed"
