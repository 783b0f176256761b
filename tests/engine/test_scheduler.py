"""The scheduler against a simulated device: any mix of requests ends, and no page is ever lost."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.config import ServerConfig
from jaxserve.engine.build import _seeds
from jaxserve.engine.drafting import NextnDrafter
from jaxserve.engine.plan import tokens_of_rows
from jaxserve.engine.rank import Limits
from jaxserve.engine.scheduler import Scheduler
from jaxserve.messages import Finish, Generate, Sampling


def next_token(tokens: list[int]) -> int:
    """The simulated model: a function of everything before."""
    return (sum(tokens) * 31 + len(tokens)) % 50


class Device:
    """Checks that a step only reads what earlier steps wrote, and samples with `next_token`."""

    def __init__(self, scheduler: Scheduler, limits: Limits):
        self.scheduler = scheduler
        self.limits = limits
        self.table: dict[tuple[int, int, int], int] = {}
        self.kv: dict[tuple[int, int], tuple[int, ...]] = {}  # (rank, page * size + offset) -> prefix
        self.last: dict[tuple[int, int], list[int]] = {}
        self.states: dict[tuple[int, int], tuple[int, ...]] = {}  # (rank, row) -> what it sums up

    def launch(self, plan):
        out = []
        for r, rank in enumerate(plan.ranks):
            entries = [(slot, index) for slot, index, _ in rank.table_updates]
            assert len(set(entries)) == len(entries), "one scatter writes an entry twice, in no order"
            for slot, index, page in rank.table_updates:
                self.table[r, slot, index] = page
            if self.limits.num_checkpoints is not None:
                self._carry_states(r, rank)
            writes, rows = [], []
            for request in rank.decode:
                sequence = request.tokens if request.pending == 1 else self.last[r, request.slot]
                drafts = rank.drafts.get(request, [])
                for count in range(len(drafts) + 1):
                    guessed = [*sequence, *drafts[:count]]
                    writes.append((request.slot, len(guessed) - 1, guessed))
                    rows.append((request.slot, guessed))
            for chunk in rank.chunks:
                tokens = chunk.request.tokens[: chunk.start + chunk.length]
                writes += [(chunk.request.slot, p, tokens[: p + 1]) for p in range(chunk.start, len(tokens))]
                if chunk.samples:
                    rows.append((chunk.request.slot, list(tokens)))
            for slot, position, prefix in writes:
                self.kv[r, self._address(r, slot, position)] = tuple(prefix)
            sampled = []
            for slot, sequence in rows:
                for p in range(len(sequence)):
                    assert self.kv[r, self._address(r, slot, p)] == tuple(sequence[: p + 1])
                token = next_token(sequence)
                self.last[r, slot] = [*sequence, token]
                sampled.append(token)
            out.append(sampled)
        return out

    def _carry_states(self, r, rank):
        """All states are read, then all are written."""
        written, stood = {}, {}
        for request in rank.decode:
            sequence = tuple(self.last[r, request.slot])
            assert self.states[r, request.slot] == sequence[:-1]
            written[request.slot] = sequence
        for chunk in rank.chunks:
            tokens = tuple(chunk.request.tokens)
            before = () if chunk.state_from < 0 else self.states[r, chunk.state_from]
            assert before == tokens[: stood.setdefault(chunk.request.slot, chunk.start)]
            after = tokens[: chunk.start + chunk.length]
            written[chunk.request.slot] = after
            if chunk.state_kept >= 0:
                assert chunk.state_kept >= self.limits.num_slots and chunk.state_kept not in written
                assert len(after) % self.limits.page_size == 0
                written[chunk.state_kept] = after
        self.states.update({(r, row): tokens for row, tokens in written.items()})

    def _address(self, r, slot, position):
        size = self.limits.page_size
        return self.table[r, slot, position // size] * size + position % size


def expected(request: Generate) -> list[int]:
    tokens = list(request.input_ids)
    for _ in range(request.sampling.max_new_tokens):
        tokens.append(next_token(tokens))
        if tokens[-1] in request.sampling.stop_token_ids:
            break
    return tokens[len(request.input_ids) :]


def prompt_of(family: int, length: int) -> list[int]:
    """Prompts of a family share a prefix; the odd families' go on as the model's own outputs do."""
    if family % 2 == 0:
        return [(family * 7 + p) % 50 for p in range(length)]
    tokens = [family * 7]
    while len(tokens) < length:
        tokens.append(next_token(tokens))
    return tokens


requests = st.lists(
    st.tuples(
        st.integers(0, 3),  # which shared prefix
        st.integers(1, 20),  # prompt length
        st.integers(1, 20),  # max new tokens
        st.booleans(),  # stops at a token
        st.integers(-1, 30),  # aborted before this step; -1: never
        st.integers(0, 2),  # priority
        st.sampled_from(["", "a"]),  # salt
        st.integers(0, 15),  # arrives before this step
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=150, deadline=None)
@given(
    *(requests, st.integers(10, 24), st.integers(1, 5), st.integers(1, 2), st.booleans()),
    st.sampled_from([None, None, 0, 1, 3, 20]),
)
def test_any_mix_of_requests_ends_with_its_own_tokens_and_no_page_lost(
    mix, num_pages, num_slots, num_ranks, share, num_checkpoints
):
    serve(mix, num_pages, num_slots, num_ranks, share, num_checkpoints)


class Guesses:
    """Drafts that are right for a while: 0 to 5 tokens of the model's own, then wrong ones."""

    max_drafts, max_rows, rests = 4, 7, True

    def propose(self, request, count):
        assert request.pending == 1 and count > 0
        tokens, right = list(request.tokens), sum(request.tokens) % 6
        for number in range(min(count, sum(tokens) % 5)):
            tokens.append(next_token(tokens) if number < right else 49 - next_token(tokens))
        return tokens[len(request.tokens) :]


@settings(max_examples=100, deadline=None)
@given(requests, st.integers(10, 24), st.integers(1, 5), st.integers(1, 2), st.booleans())
def test_drafts_right_or_wrong_change_no_token_and_lose_no_page(mix, num_pages, num_slots, num_ranks, share):
    serve(mix, num_pages, num_slots, num_ranks, share, drafter=Guesses())


def test_crowds_with_drafts_are_retracted_stop_and_are_aborted_on_the_way():
    draw = random.Random(1)
    paths = {"retracted": 0, "shared": 0, "stopped": 0, "aborted": 0, "accepted": 0, "wrong": 0}
    for _ in range(40):
        mix = [
            (
                draw.randrange(4), draw.randint(1, 24), draw.randint(1, 24), draw.random() < 0.5,
                draw.randrange(60) if draw.random() < 0.2 else -1, draw.randrange(3),
                draw.choice(["", "a"]), draw.randrange(40),
            )
            for _ in range(40)
        ]  # fmt: skip
        sizes = draw.randint(12, 20), draw.randint(3, 8), draw.randint(1, 2)
        for request in serve(mix, *sizes, True, drafter=Guesses()):
            paths["retracted"] += request.num_retractions > 0
            paths["shared"] += request.cached_tokens > 0
            paths["stopped"] += request.finish.type == "stop"
            paths["aborted"] += request.finish.type == "abort"
            paths["accepted"] += request.num_accepted
            paths["wrong"] += request.num_drafted > request.num_accepted
    assert min(paths.values()) > 20, paths


@pytest.mark.parametrize("num_checkpoints", [None, 4], ids=["kv", "states"])
def test_crowds_share_are_retracted_stop_and_are_aborted_on_the_way(num_checkpoints):
    """Large mixes, so that what hypothesis rarely draws happens often."""
    draw = random.Random(0)
    paths = {"retracted": 0, "shared": 0, "stopped": 0, "aborted": 0}
    for _ in range(60):
        mix = [
            (
                draw.randrange(4), draw.randint(1, 24), draw.randint(1, 24), draw.random() < 0.5,
                draw.randrange(60) if draw.random() < 0.2 else -1, draw.randrange(3),
                draw.choice(["", "a"]), draw.randrange(40),
            )
            for _ in range(40)
        ]  # fmt: skip
        sizes = draw.randint(12, 20), draw.randint(3, 8), draw.randint(1, 2)
        for request in serve(mix, *sizes, True, num_checkpoints):
            paths["retracted"] += request.num_retractions > 0
            paths["shared"] += request.cached_tokens > 0
            paths["stopped"] += request.finish.type == "stop"
            paths["aborted"] += request.finish.type == "abort"
    assert min(paths.values()) > 20, paths


def serve(mix, num_pages, num_slots, num_ranks, share, num_checkpoints=None, drafter=None):
    """Run a mix to its end, auditing after every action; returns the requests."""
    limits = Limits(
        num_pages=num_pages,
        page_size=4,
        num_slots=num_slots,
        step_tokens=16,
        prefill_tokens=12,
        prefill_chunks=3,
        num_checkpoints=num_checkpoints,
    )
    seeds = random.Random(1)
    scheduler = Scheduler(limits, num_ranks, share, clock=lambda: 0.0, seeds=seeds, drafter=drafter)
    device = Device(scheduler, limits)
    specs, aborts, arrivals = {}, {}, {}
    for i, (family, length, new, stops, abort, priority, salt, arrival) in enumerate(mix):
        prompt = prompt_of(family, length)
        sampling = Sampling(max_new_tokens=new, stop_token_ids=(3, 11, 29) if stops else ())
        spec = Generate(rid=str(i), input_ids=prompt, sampling=sampling, priority=priority, cache_salt=salt)
        specs[spec.rid] = spec
        aborts.setdefault(abort, []).append(spec.rid)
        arrivals.setdefault(arrival, []).append(spec)
    live, aborted, in_flight = {}, set(), None
    for step in range(2000):
        for spec in arrivals.pop(step, ()):
            live[spec.rid] = scheduler.submit(spec)
        for rid in aborts.pop(step, ()):
            if scheduler.abort(rid, Finish("abort", message="test")):
                aborted.add(rid)
        if in_flight and (in_flight[0].has_drafts or scheduler.drafts_next):
            scheduler.retire(*in_flight)
            scheduler.check()
            in_flight = None
        plan = scheduler.plan()
        scheduler.check()
        if plan:
            assert all(rank.num_tokens <= limits.step_tokens for rank in plan.ranks)
            assert all(rank.num_prefill_tokens <= limits.prefill_tokens for rank in plan.ranks)
        if plan and drafter:
            assert all(rank.num_rows <= max(num_slots, drafter.max_rows) for rank in plan.ranks)
        sampled = device.launch(plan) if plan else None
        if in_flight:
            scheduler.retire(*in_flight)
            scheduler.check()
        in_flight = (plan, sampled) if plan else None
        if not scheduler.has_work and not arrivals and in_flight is None:
            break
    else:
        raise AssertionError("requests never ended")
    for rid, request in live.items():
        assert request.finish is not None
        outputs = request.tokens[request.prompt_len :]
        if rid in aborted:
            assert outputs == expected(specs[rid])[: len(outputs)]
        else:
            assert outputs == expected(specs[rid])
    for rank in scheduler.ranks:
        assert not rank.running and not rank.waiting
        assert rank.pool.num_free + rank.tree.num_pages == num_pages
    scheduler.flush()
    assert all(rank.pool.num_free == num_pages for rank in scheduler.ranks)
    return list(live.values())


def run(scheduler: Scheduler, device: Device, steps: int = 200) -> None:
    in_flight = None
    for _ in range(steps):
        plan = scheduler.plan()
        sampled = device.launch(plan) if plan else None
        if in_flight:
            scheduler.retire(*in_flight)
        in_flight = (plan, sampled) if plan else None


def make(
    num_pages=32,
    num_slots=4,
    prefill_tokens=16,
    chunks=4,
    num_checkpoints=None,
    step_tokens=None,
    drafter=None,
) -> tuple[Scheduler, Device]:
    limits = Limits(
        num_pages=num_pages,
        page_size=4,
        num_slots=num_slots,
        step_tokens=step_tokens or prefill_tokens + tokens_of_rows(num_slots),
        prefill_tokens=prefill_tokens,
        prefill_chunks=chunks,
        num_checkpoints=num_checkpoints,
    )
    scheduler = Scheduler(limits, clock=lambda: 0.0, drafter=drafter)
    return scheduler, Device(scheduler, limits)


def ask(rid: str, prompt: list[int], new: int = 4, **kw) -> Generate:
    return Generate(rid=rid, input_ids=prompt, sampling=Sampling(max_new_tokens=new), **kw)


def test_second_request_reuses_the_full_pages_of_the_first():
    scheduler, device = make()
    prompt = list(range(10))
    scheduler.submit(ask("a", prompt))
    run(scheduler, device)
    second = scheduler.submit(ask("b", prompt))
    run(scheduler, device)
    assert second.cached_tokens == 8


def test_prompt_of_whole_pages_still_computes_its_last_page():
    scheduler, device = make()
    scheduler.submit(ask("a", list(range(8))))
    run(scheduler, device)
    second = scheduler.submit(ask("b", list(range(8))))
    run(scheduler, device)
    assert second.cached_tokens == 4


def test_equal_prompts_of_one_step_share_pages_at_once():
    scheduler, _ = make(prefill_tokens=32)
    first, second = scheduler.submit(ask("a", list(range(9)))), scheduler.submit(ask("b", list(range(9))))
    plan = scheduler.plan()
    assert [c.length for c in plan.ranks[0].chunks] == [9, 1]
    assert first.pages[:2] == second.pages[:2]


def test_other_salt_shares_nothing():
    scheduler, device = make()
    scheduler.submit(ask("a", list(range(10)), cache_salt="x"))
    run(scheduler, device)
    second = scheduler.submit(ask("b", list(range(10)), cache_salt="y"))
    run(scheduler, device)
    assert second.cached_tokens == 0


def test_prompt_whose_logprobs_are_wanted_is_computed_from_there():
    scheduler, device = make()
    scheduler.submit(ask("a", list(range(12))))
    run(scheduler, device)
    second = scheduler.submit(ask("b", list(range(12)), return_logprob=True, logprob_start_len=5))
    run(scheduler, device)
    assert second.cached_tokens == 4


def test_retracted_request_resumes_with_the_same_tokens():
    scheduler, device = make(num_pages=8, num_slots=2)
    specs = [ask("a", [1, 2, 3], new=25), ask("b", [4, 5, 6], new=25)]
    live = [scheduler.submit(spec) for spec in specs]
    run(scheduler, device)
    assert live[1].num_retractions > 0 and live[0].num_retractions == 0
    for spec, request in zip(specs, live):
        assert request.tokens[3:] == expected(spec)


def test_higher_priority_is_served_first():
    scheduler, _ = make(num_slots=1)
    scheduler.submit(ask("low", [1, 2]))
    scheduler.submit(ask("high", [3, 4], priority=5))
    assert [c.request.spec.rid for c in scheduler.plan().ranks[0].chunks] == ["high"]


def test_waiting_request_is_aborted_wherever_it_stands_and_the_others_keep_their_order():
    scheduler, _ = make(num_slots=1)
    for number in range(6):
        scheduler.submit(ask(str(number), [number] * 5, priority=number % 3))
    for rid in ("4", "0"):
        scheduler.abort(rid, Finish("abort"))
    [rank] = scheduler.ranks
    assert [request.spec.rid for request in rank.waiting] == ["2", "5", "1", "3"]


def test_rows_and_prompts_share_the_tokens_of_a_step():
    scheduler, device = make(num_pages=200, num_slots=9, prefill_tokens=24, step_tokens=24, chunks=9)
    for rid in "abcdefgh":
        scheduler.submit(ask(rid, [ord(rid)], new=10))
    device.launch(scheduler.plan())
    scheduler.submit(ask("long", list(range(60))))
    (plan,) = scheduler.plan().ranks  # eight rows take eight places, and leave sixteen
    assert (plan.num_rows, plan.num_prefill_tokens, plan.first_prompt_token) == (8, 16, 8)
    assert plan.num_tokens == 24


def test_guesses_take_only_the_places_that_prompts_leave():
    scheduler, device = make(num_pages=64, num_slots=9, prefill_tokens=24, step_tokens=24, drafter=Guesses())
    scheduler.submit(ask("a", prompt_of(1, 9), new=20))
    plan = scheduler.plan()
    scheduler.retire(plan, device.launch(plan))
    scheduler.submit(ask("b", list(range(15)), new=1))
    (plan,) = scheduler.plan().ranks  # 15 tokens leave nine places, of which rows can have eight
    assert plan.num_prefill_tokens == 15
    assert 1 < plan.num_rows <= 8 and plan.num_tokens <= 24


def test_long_prompt_is_cut_into_chunks_while_others_decode():
    scheduler, device = make(prefill_tokens=4)
    first = scheduler.submit(ask("a", [1, 2], new=10))
    plan = scheduler.plan()
    sampled = device.launch(plan)
    scheduler.submit(ask("b", list(range(13)), new=1))
    lengths = []
    for _ in range(5):
        following = scheduler.plan()
        lengths.append(
            ([r.spec.rid for r in following.ranks[0].decode], following.ranks[0].num_prefill_tokens)
        )
        following_sampled = device.launch(following)
        scheduler.retire(plan, sampled)
        plan, sampled = following, following_sampled
    assert lengths[:4] == [(["a"], 4), (["a"], 4), (["a"], 4), (["a"], 1)]
    assert first.tokens[2:] == expected(first.spec)[: len(first.tokens) - 2]


def test_rows_of_decode_come_longest_first():
    scheduler, device = make()
    for name, length in (("short", 2), ("long", 9), ("middle", 5)):
        scheduler.submit(ask(name, list(range(length)), new=4))
    first = scheduler.plan()
    scheduler.retire(first, device.launch(first))
    (plan,) = scheduler.plan().ranks
    assert [request.spec.rid for request in plan.decode] == ["long", "middle", "short"]


def test_request_goes_to_the_rank_that_holds_its_prefix():
    limits = Limits(32, 4, 4, 32, 16, 4, 128)
    scheduler = Scheduler(limits, num_ranks=2, clock=lambda: 0.0)
    device = Device(scheduler, limits)
    other = scheduler.submit(ask("other", [9] * 12, dp_rank=1))
    run(scheduler, device)
    again = scheduler.submit(ask("again", [9] * 12 + [1]))
    assert (other.rank, again.rank) == (1, 1)


class Silence:
    """Never a draft."""

    max_drafts, max_rows, rests = 3, 8, True

    def propose(self, request, count):
        return []


def test_request_that_drafts_do_not_help_goes_ahead_of_the_device_and_tries_again():
    limits = Limits(32, 4, 4, 32, 16, 4, 128)
    scheduler = Scheduler(limits, clock=lambda: 0.0, drafter=Silence())
    device = Device(scheduler, limits)
    scheduler.submit(ask("a", [1], new=60))
    waits, in_flight = "", None
    while scheduler.has_work:
        waits += "w" if scheduler.drafts_next else "."
        if in_flight and (in_flight[0].has_drafts or scheduler.drafts_next):
            scheduler.retire(*in_flight)
            in_flight = None
        plan = scheduler.plan()
        sampled = device.launch(plan) if plan else None
        if in_flight:
            scheduler.retire(*in_flight)
        in_flight = (plan, sampled) if plan else None
    assert waits[:42] == ".wwwww" + 16 * "." + "ww" + 16 * "." + "ww"


def test_step_waits_for_one_whose_states_the_model_guesses_from_though_nobody_runs():
    """A step may outlive its requests, and the next one's states must not take the place of its own."""
    scheduler = Scheduler(Limits(32, 4, 4, 32, 16, 4, 128), clock=lambda: 0.0, drafter=NextnDrafter(1, 8))
    scheduler.submit(ask("a", [1]))
    assert scheduler.plan() is not None
    scheduler.abort("a", Finish("abort"))
    assert scheduler.drafts_next


@pytest.mark.parametrize("seed", [None, 7])
def test_requests_without_a_seed_draw_alike_only_on_one_replica_with_a_seed(seed):
    def drawn(replica):
        config = ServerConfig.from_keywords(model_path="m", random_seed=seed, base_gpu_id=replica)
        return [_seeds(config).getrandbits(31) for _ in range(4)]

    assert len(set(drawn(0))) == (4 if seed is None else 1), "each call is a start of the engine"
    assert not set(drawn(0)) & set(drawn(1))
