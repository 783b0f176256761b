"""Whole engines with recurrent states: going on from kept states gives the tokens of computing all.

Random greedy continuations are compared token by token. Margins of this model's steps are about 0.7 in
the median; the seeds here meet none below 1e-3.
"""

import numpy as np
import pytest

from jaxserve.messages import Generate, Sampling
from tests.engine.asking import Followed, ask, greedy, tokens

FAMILY = "minimax_text"


@pytest.fixture
def kept(engine):
    small = engine(FAMILY)
    small.flush_cache()
    return small


@pytest.fixture
def bare(engine):
    return engine(FAMILY, disable_radix_cache=True)


def cached(replies):
    return [reply["meta_info"]["cached_tokens"] for reply in replies]


def test_prompts_that_part_go_on_from_there_at_the_third(kept, bare):
    shared = [3 + 7 * i % 300 for i in range(50)]
    rows = [greedy(shared + [10 + i] * 30, 12) for i in range(3)]
    replies = [ask(kept, [row])[0] for row in rows]
    assert cached(replies) == [0, 0, 48]
    assert tokens(replies) == tokens([ask(bare, [row])[0] for row in rows])


def test_talks_that_branch_and_grow_get_the_tokens_of_a_bare_engine(kept, bare):
    """Turns of four talks at a time, some going on with an answer, some with a part of it or of a prompt."""
    rng = np.random.default_rng(11)
    talks, hits = [rng.integers(3, 320, 40).tolist()], 0
    for _ in range(6):
        rows = []
        for _ in range(4):
            talk = talks[rng.integers(len(talks))]
            start = talk[: rng.integers(1, len(talk) + 1)] if rng.random() < 0.5 else talk
            rows.append(greedy(start[:180] + rng.integers(3, 320, rng.integers(1, 40)).tolist(), 8))
        replies = ask(kept, rows)
        assert tokens(replies) == tokens(ask(bare, rows))
        talks += [row.prompt + reply["output_ids"] for row, reply in zip(rows, replies)]
        hits += sum(map(bool, cached(replies)))
    assert hits > 4


def test_request_left_between_its_chunks_spoils_nothing(kept, bare):
    prompt = [5 + 11 * i % 300 for i in range(200)]  # seven chunks
    left = Generate(rid="left", input_ids=prompt, sampling=Sampling(max_new_tokens=100, temperature=0.0))
    connection = kept._connection

    async def leave():
        stream = Followed(connection, left)
        await connection.call("loads")  # answered between two steps
        await stream.aclose()

    async def leave_after_some_tokens():
        stream = Followed(connection, left)
        for _ in range(5):
            await anext(stream)
        await stream.aclose()

    [want] = tokens(ask(bare, [greedy(prompt)]))
    for way in (leave, leave_after_some_tokens):
        kept._run(way())
        assert tokens(ask(kept, [greedy(prompt)] * 2)) == [want, want]
    assert cached(ask(kept, [greedy([*prompt, *want[:10], 9])])) == [192]


def test_answer_that_stopped_a_step_late_is_gone_on_from_rightly(kept, bare):
    prompt = [9 + 13 * i % 300 for i in range(35)]
    [whole] = tokens(ask(bare, [greedy(prompt)]))
    stop = next(i for i in range(4, 24) if whole[i] not in whole[:i])
    [reply] = ask(kept, [greedy(prompt, ignore_eos=False, stop_token_ids=[whole[stop]])])
    assert reply["output_ids"] == whole[: stop + 1]
    turn = greedy([*prompt, *reply["output_ids"], 44, 45])
    assert tokens(ask(kept, [turn])) == tokens(ask(bare, [turn]))
    assert cached(ask(kept, [turn])) == [len(turn.prompt) // 16 * 16]
