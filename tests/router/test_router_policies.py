"""Each policy on workers made by hand: which one it picks, and that it never leaves the list."""

import random
from collections import Counter

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.breaker import Breaker
from router.call import ROUTES, Call
from router.config import POLICIES, RouterConfig
from router.policies import make_policy, ring
from router.policies.cache_aware import BLOCK_BYTES, CacheAware, Image, block_chain
from router.upstream import Address, Pool
from router.workers import Load, Worker, WorkerSpec

CHAT = ROUTES["/v1/chat/completions"]


def workers(n: int, capacity_tokens: int | None = None) -> list[Worker]:
    out = []
    for i in range(n):
        url = f"http://w{i}:80"
        worker = Worker(WorkerSpec(url=url), Breaker(lambda: 0.0), Pool(Address.parse(url)))
        worker.status = "ready"
        worker.capacity_tokens = capacity_tokens
        out.append(worker)
    return out


def policy(name: str, **settings):
    config = RouterConfig.from_keywords(policy=name, **settings)
    return make_policy(config.effective_policy, config, random.Random(7))


def chat(*contents: str, key: str | None = None, target: Worker | None = None, **fields) -> Call:
    messages = [{"role": "user", "content": text} for text in contents]
    call = Call(CHAT, msgspec.json.encode({"messages": messages, **fields}))
    call.parse(True)
    call.routing_key, call.target_worker = key, target
    return call


def send(p, call: Call, ws) -> Worker:
    worker = p.choose(call, ws)
    p.placed(call, worker)
    worker.total += 1
    return worker


def test_round_robin_takes_turns():
    ws, p = workers(3), policy("round_robin")
    assert [p.choose(chat("x"), ws) for _ in range(6)] == ws + ws


def test_random_reaches_every_worker():
    ws, p = workers(4), policy("random")
    counts = Counter(p.choose(chat("x"), ws) for _ in range(400))
    assert len(counts) == 4 and min(counts.values()) > 60


def test_power_of_two_never_takes_the_fullest_of_many():
    ws, p = workers(3), policy("power_of_two")
    ws[1].in_flight = 50
    assert ws[1] not in {p.choose(chat("x"), ws) for _ in range(100)}


def test_power_of_two_sees_the_work_of_other_gateways():
    ws, p = workers(2), policy("power_of_two")
    ws[0].report(Load(running=9))
    assert {p.choose(chat("x"), ws) for _ in range(20)} == {ws[1]}


def test_least_load_weighs_prompt_tokens_not_only_requests():
    ws, p = workers(2), policy("least_load")
    ws[0].in_flight, ws[0].pending_tokens = 1, 8000
    ws[1].in_flight, ws[1].pending_tokens = 3, 30
    assert p.choose(chat("x"), ws) is ws[1]


def test_prefix_hash_sends_equal_heads_together_and_spreads_different_ones():
    ws, p = workers(4), policy("prefix_hash", prefix_token_count=16)
    same = {p.choose(chat("y" * 200, str(i)), ws) for i in range(20)}
    assert len(same) == 1
    assert len({p.choose(chat(f"{i}" * 100), ws) for i in range(60)}) == 4


def test_prefix_hash_spills_from_an_overloaded_worker():
    ws, p = workers(2), policy("prefix_hash")
    home = p.choose(chat("z" * 2000), ws)
    home.in_flight = 10
    call = chat("z" * 2000)
    assert p.choose(call, ws) is not home and call.decision == "spill"


def test_prefix_hash_keeps_most_keys_when_a_worker_leaves():
    ws, p = workers(4), policy("prefix_hash")
    calls = [chat(f"{i:04d}" * 100) for i in range(200)]
    before = [p.choose(c, ws) for c in calls]
    after = [p.choose(c, ws[:3]) for c in calls]
    assert all(b is a for b, a in zip(before, after, strict=True) if b is not ws[3])


def test_ring_of_a_set_of_workers_is_built_once_though_models_alternate(monkeypatch):
    built = []
    build = ring._build
    monkeypatch.setattr(ring, "_build", lambda workers: built.append(workers) or build(workers))
    ws, r = workers(4), ring.Ring()
    owners = {(r.find(b"key", ws[:2]), r.find(b"key", ws[2:])) for _ in range(10)}
    assert len(owners) == 1 and len(built) == 2
    for i in range(2 * ring.MAX_RINGS):
        r.find(b"key", [*ws[:2], *workers(i % 2 + 1)])
    assert len(r._rings) == ring.MAX_RINGS


def test_consistent_hashing_obeys_the_target_then_the_key():
    ws, p = workers(3), policy("consistent_hashing")
    assert p.choose(chat("x", target=ws[2]), ws) is ws[2]
    call = chat("x", key="alice", target=ws[0])
    assert p.choose(call, ws[1:]) in ws[1:] and call.decision == "key"
    assert len({p.choose(chat("x", key="alice"), ws) for _ in range(10)}) == 1
    assert len({p.choose(chat("x", key=f"user{i}"), ws) for i in range(60)}) == 3


def test_manual_keeps_a_key_at_its_worker_and_brings_it_home():
    ws, p = workers(3), policy("manual")
    home = p.choose(chat("x", key="s"), ws)
    others = [w for w in ws if w is not home]
    away = p.choose(chat("x", key="s"), others)
    assert p.choose(chat("x", key="s"), others) is away
    assert p.choose(chat("x", key="s"), ws) is home


def test_manual_min_group_spreads_keys_evenly():
    ws, p = workers(3), policy("manual", assignment_mode="min_group")
    counts = Counter(p.choose(chat("x", key=f"k{i}"), ws) for i in range(30))
    assert set(counts.values()) == {10}


def test_manual_forgets_idle_keys():
    ws, p = workers(2), policy("manual", max_idle_secs=60)
    now = [0.0]
    p.clock = lambda: now[0]
    p.choose(chat("x", key="old"), ws)
    now[0] = 61
    p.choose(chat("x", key="new"), ws)
    assert list(p.keys) == ["new"]


def test_manual_forgets_a_removed_worker():
    ws, p = workers(2), policy("manual")
    home = p.choose(chat("x", key="s"), ws)
    p.forget(home)
    assert "s" not in p.keys


# ---- the threshold rule, at its edges ----


def test_threshold_flags_switch_cache_aware_to_the_threshold_rule():
    config = RouterConfig.from_keywords(policy="cache_aware", cache_threshold=0.3)
    assert config.effective_policy == "cache_aware_threshold"
    assert RouterConfig.from_keywords(policy="cache_aware").effective_policy == "cache_aware"


def test_threshold_follows_the_prefix_only_above_the_threshold():
    ws, p = workers(2), policy("cache_aware_threshold", cache_threshold=0.5)
    p.placed(chat("a" * 50 + "b" * 50), ws[1])
    ws[1].total = 5
    exactly = chat("a" * 50 + "c" * 50)
    assert p.choose(exactly, ws) is ws[0] and exactly.decision == "no_prefix"
    above = chat("a" * 50 + "b" + "c" * 49)
    assert p.choose(above, ws) is ws[1] and above.decision == "prefix"


def test_threshold_needs_both_imbalance_conditions():
    ws, p = workers(2), policy("cache_aware_threshold", balance_abs_threshold=4, balance_rel_threshold=2.0)
    p.placed(chat("a" * 100), ws[0])

    def pick(a: int, b: int) -> str:
        ws[0].in_flight, ws[1].in_flight = a, b
        call = chat("a" * 100)
        p.choose(call, ws)
        return call.decision

    assert pick(4, 0) == "prefix"  # difference exactly at the threshold
    assert pick(5, 0) == "unbalanced"
    assert pick(10, 5) == "prefix"  # twice, not more than twice
    assert pick(11, 5) == "unbalanced"


# ---- the fused cost ----


def test_cache_aware_returns_a_growing_chat_to_its_worker():
    ws, p = workers(4, 100_000), policy("cache_aware")
    turns = ["s" * 2000]
    first = send(p, chat(*turns), ws)
    for i in range(5):
        turns += [f"answer {i} " * 20, f"question {i} " * 20]
        assert send(p, chat(*turns), ws) is first


def test_cache_aware_spreads_unrelated_prompts():
    ws, p = workers(4, 100_000), policy("cache_aware")
    counts = Counter(send(p, chat(f"{i}" * 3000), ws) for i in range(40))
    assert max(counts.values()) <= 12 and len(counts) == 4


def test_cache_aware_leaves_a_worker_whose_queue_costs_more_than_a_miss():
    ws, p = workers(2, 100_000), policy("cache_aware")
    home = send(p, chat("p" * 4000), ws)
    home.pending_tokens = 1000
    assert p.choose(chat("p" * 4000), ws) is home  # a miss would cost 2 * 1000
    home.pending_tokens = 3000
    call = chat("p" * 4000)
    assert p.choose(call, ws) is not home and call.decision == "prefix_too_busy"


def test_cache_aware_does_not_share_prefixes_across_salts_and_adapters():
    plain = block_chain(chat("q" * 2000))
    assert plain == block_chain(chat("q" * 2000))
    assert plain != block_chain(chat("q" * 2000, cache_salt="tenant"))
    assert plain != block_chain(chat("q" * 2000, extra_key="tenant"))
    assert plain != block_chain(chat("q" * 2000, lora_path="adapter"))


def test_cache_aware_image_shrinks_when_the_worker_has_less_than_expected():
    ws, p = workers(1, 4096), policy("cache_aware")
    for i in range(80):
        send(p, chat(f"{i:02d}" * 1000), ws)
    image = p.images[ws[0]]
    before = image.capacity
    call = chat("79" * 1000)
    send(p, call, ws)
    assert call.predicted_tokens > 400
    p.learned(call, ws[0], call.prompt_tokens, 0)
    assert image.capacity < before


def test_cache_aware_forgets_a_cleared_worker():
    ws, p = workers(1, 100_000), policy("cache_aware")
    send(p, chat("p" * 4000), ws)
    p.cleared(ws[0])
    call = chat("p" * 4000)
    p.choose(call, ws)
    assert call.predicted_tokens == 0


@pytest.mark.parametrize("name", POLICIES)
def test_request_may_be_placed_at_another_worker_than_the_policy_chose(name):
    """A breaker's probe, a worker that asked for a pause, one whose cache was cleared since."""
    ws, p = workers(2, 100_000), policy(name)
    call = chat("p" * 4000)
    p.choose(call, ws[:1])
    p.placed(call, ws[0])
    for worker in (ws[1], ws[0]):
        p.cleared(worker)
        p.placed(call, worker)
        p.learned(call, worker, 1000, 900)
    again = chat("p" * 4000)
    assert p.choose(again, ws) in ws


def test_cache_aware_holds_no_more_than_max_tree_size_over_all_workers():
    bound = 64 * 1024
    ws, p = workers(4), policy("cache_aware", max_tree_size=bound)
    for i in range(300):
        send(p, chat(f"{i:03d}" * 1000), ws)
    assert 0 < p.stats()["tree_chars"] <= bound
    p.forget(ws[0])
    for i in range(300):
        send(p, chat(f"{i:03d}" * 1000), ws[1:])
    assert bound // 2 < p.stats()["tree_chars"] <= bound


@given(st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=6), max_size=40), st.integers(16, 24))
def test_image_match_by_bisection_agrees_with_walking(paths, capacity):
    image = Image(capacity)
    for path in paths:
        chain, seed = [], 0
        for step in path * 4:  # chains as long as the image, so that eviction cuts them
            seed = hash((seed, step))
            chain.append(seed)
        walked = next((i for i, block in enumerate(chain) if block not in image.blocks), len(chain))
        assert image.match(chain) == walked
        image.insert(chain)
        assert len(image.blocks) <= capacity


@given(
    st.sampled_from(POLICIES),
    st.lists(
        st.tuples(
            st.text(max_size=8), st.integers(1, 5), st.integers(0, 30), st.none() | st.text(max_size=3)
        ),
        max_size=20,
    ),
)
def test_every_policy_picks_one_of_the_workers_it_is_given(name, steps):
    p = policy(name)
    assert isinstance(p, CacheAware) or name != "cache_aware"
    ws = workers(5, 4096)
    for text, count, load, key in steps:
        offered = ws[:count]
        call = chat(text * 60, key=key)
        worker = send(p, call, offered)
        assert worker in offered and call.decision
        worker.in_flight = load
        p.learned(call, worker, 100, load)
    p.sweep(0.0)
    p.stats()
    for worker in ws:
        p.forget(worker)


def test_block_is_longer_than_a_worker_page():
    assert BLOCK_BYTES >= 64  # 16 tokens of 4 characters
