"""Random crowds on eight ranks whose pools are too small: aborts, retractions and shared prefixes, and
every answer is that of one device."""

import asyncio
import random
from dataclasses import dataclass

import numpy as np
import pytest

from jaxserve.messages import Generate, Output, Sampling
from tests.engine.asking import NOISE, Row, ask

VOCAB = 128
TIGHT = {"max_total_tokens": 160}  # a rank: ten pages, where four running requests want up to 28
LAYOUT = {"tp": 8, "ep": 8, "dp_size": 8, "enable_dp_attention": True}
AT_ONCE = 80


@dataclass(frozen=True)
class Visit:
    """One request, and after how many tokens its client leaves; None: never."""

    prompt: list[int]
    new: int
    leaves_after: int | None


def visits(count: int, seed: int) -> list[Visit]:
    """Half of the prompts go on from one of six beginnings; one client of seven leaves."""
    draw = random.Random(seed)
    beginnings = [[draw.randrange(3, VOCAB) for _ in range(48)] for _ in range(6)]
    made = []
    for _ in range(count):
        own = [draw.randrange(3, VOCAB) for _ in range(draw.randint(1, 40))]
        prompt = [*draw.choice(beginnings), *own] if draw.random() < 0.5 else own
        new = draw.randint(1, 24)
        made.append(Visit(prompt, new, draw.randint(0, new) if draw.random() < 1 / 7 else None))
    return made


async def visit(engine, number: int, one: Visit, room: asyncio.Semaphore):
    """The tokens that came, and the last output where the client stayed for it."""
    async with room:
        spec = Generate(
            rid=f"soak-{number}",
            input_ids=one.prompt,
            sampling=Sampling(max_new_tokens=one.new, temperature=0),
        )
        heard: list[Output] = []

        def take(output: Output) -> bool:
            heard.append(output)
            return True

        outputs = engine._connection.generate(spec, take)
        if one.leaves_after == 0:
            await asyncio.sleep(0)
            await outputs.aclose()
            return [], None
        async for _ in outputs:
            tokens = [token for output in heard for token in output.token_ids]
            if one.leaves_after is not None and len(tokens) >= one.leaves_after and heard[-1].finish is None:
                await outputs.aclose()
                return tokens, None
        return [token for output in heard for token in output.token_ids], heard[-1]


def soak(engine, count: int, seed: int) -> None:
    crowd = visits(count, seed)
    one, eight = engine("deepseek_v3"), engine("deepseek_v3", **LAYOUT, **TIGHT)
    before = eight.stats()

    async def all_visits():
        room = asyncio.Semaphore(AT_ONCE)
        return await asyncio.gather(*(visit(eight, n, v, room) for n, v in enumerate(crowd)))

    answers = eight._run(all_visits())
    eight._run(idle(eight))
    check_nothing_is_lost(eight)
    check_answers(one, crowd, answers)

    after = eight.stats()
    finished = [last for _, last in answers if last is not None]
    assert len(finished) < count, "nobody left"
    assert {last.dp_rank for last in finished} == set(range(8))
    assert sum(last.num_retractions for last in finished) > count // 50
    assert sum(last.cached_tokens for last in finished) > count
    assert after["compiles_after_ready"] == before["compiles_after_ready"] == 0


async def idle(engine) -> None:
    """Until the engine has seen every client that left; each look waits for its answer."""
    rows = [{"num_running_reqs": 1, "num_waiting_reqs": 0}]
    while any(row["num_running_reqs"] + row["num_waiting_reqs"] for row in rows):
        rows = await engine._connection.call("loads")


def check_nothing_is_lost(engine) -> None:
    """Every page and slot of every rank has one owner, and after a flush all pages are free."""
    plan = engine._engine.scheduler
    plan.check()
    engine.flush_cache()
    plan.check()
    for rank in plan.ranks:
        assert rank.pool.num_free == plan.limits.num_pages, f"rank {rank.index} lost pages"
        assert len(rank.free_slots) == plan.limits.num_slots, f"rank {rank.index} lost slots"


def check_answers(one, crowd: list[Visit], answers) -> None:
    """What came is what one device says, up to a token where its first two choices are too close to call."""
    rows = [Row(v.prompt, {"max_new_tokens": v.new, "temperature": 0, "ignore_eos": True}) for v in crowd]
    wants = [reply["output_ids"] for reply in ask(one, rows)]
    close = 0
    for visit, row, want, (got, last) in zip(crowd, rows, wants, answers):
        assert len(got) == visit.new or last is None
        if got != want[: len(got)]:
            first = int(np.flatnonzero(np.array(got) != np.array(want[: len(got)]))[0])
            assert margin(one, row, first) < NOISE, (visit, got, want)
            close += 1
    assert close <= len(crowd) // 50, f"{close} answers hang on a rounding; the test proves too little"


def margin(one, row: Row, position: int) -> float:
    """Between the logprobs of the two best tokens at an output position."""
    [reply] = ask(one, [row], return_logprob=True, top_logprobs_num=2)
    (best, *_), (second, *_) = reply["meta_info"]["output_top_logprobs"][position]
    return best - second


@pytest.fixture(autouse=True)
def no_headroom(monkeypatch):
    """Admission keeps nothing free for growth, so that requests must be taken back."""
    monkeypatch.setattr("jaxserve.engine.rank.GROWTH_TOKENS", 0)


def test_thousand_random_requests_on_eight_ranks_answer_as_one_device_and_lose_no_page(engine):
    soak(engine, 1000, seed=2)
