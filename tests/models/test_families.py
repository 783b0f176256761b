"""Every family against logits recorded from the reference implementation."""

import numpy as np
import pytest

from tests.models.tiny import FAMILIES, MOE_FAMILIES, Chunk, Golden, TinyEngine, load_tiny

# Logits reach 20 in these checkpoints: float32 keeps about 1e-6 of that, and sums of some hundred
# terms taken in another order a few times more. A wrong position, window or norm shows above 1e-2.
TOLERANCE = 1e-4


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)


# Every step has one of these shapes, so that a family compiles three programs.
ROWS, PROMPT, WHOLE = 5, 48, 176


@pytest.fixture(scope="module", params=FAMILIES + MOE_FAMILIES)
def loaded(request):
    return TinyEngine(load_tiny(request.param)), Golden.read(request.param)


@pytest.fixture
def family(loaded):
    """An engine with nothing in its pools, and what was recorded of its checkpoint."""
    engine, golden = loaded
    engine.forget()
    return engine, golden


def test_whole_prompts_packed_in_one_step_give_the_recorded_logits(family):
    engine, golden = family
    chunks = [Chunk(slot, 0, prompt) for slot, prompt in enumerate(golden.prompts)]
    (logits,) = engine.step([[]], [chunks], R=0, P=WHOLE)
    ends = np.cumsum([len(prompt) for prompt in golden.prompts])
    for got, want in zip(np.split(logits, ends), golden.logits, strict=False):
        close(got, want)


def test_prompt_in_uneven_chunks_gives_the_recorded_logits(family):
    engine, golden = family
    prompt, want = golden.prompts[-1], golden.logits[-1]
    at = 0
    for length in (5, 40, 1, 33, 41):
        chunk = Chunk(2, at, prompt[at : at + length])
        (logits,) = engine.step([[]], [[chunk]], R=ROWS, P=PROMPT)
        close(logits[ROWS : ROWS + length], want[at : at + length])
        at += length
    assert at == len(prompt)


def test_decode_after_prefill_gives_the_recorded_logits(family):
    engine, golden = family
    prompt, want = golden.prompts[2], golden.logits[2]
    engine.step([[]], [[Chunk(1, 0, prompt[:20])]], R=ROWS, P=PROMPT)
    for position in range(20, len(prompt)):
        (logits,) = engine.step([[Chunk(1, position, prompt[position:])]], [[]], R=ROWS, P=0)
        close(logits[0], want[position])


def test_decode_rows_beside_a_prefill_chunk_do_not_disturb_each_other(family):
    engine, golden = family
    short, long = golden.prompts[2], golden.prompts[3]
    engine.step([[]], [[Chunk(0, 0, short[:-1])]], R=ROWS, P=PROMPT)
    (logits,) = engine.step(
        [[Chunk(0, len(short) - 1, short[-1:])]], [[Chunk(4, 0, long[:40])]], R=ROWS, P=PROMPT
    )
    close(logits[0], golden.logits[2][-1])
    close(logits[ROWS : ROWS + 40], golden.logits[3][:40])


def test_greedy_continuations_are_the_recorded_tokens(family):
    """All prompts in one batch. Margins of the recording are above 1e-3, ten times the tolerance."""
    engine, golden = family
    assert golden.margin.min() > 10 * TOLERANCE
    chunks = [Chunk(slot, 0, prompt) for slot, prompt in enumerate(golden.prompts)]
    (logits,) = engine.step([[]], [chunks], R=0, P=WHOLE)
    lengths = np.array([len(prompt) for prompt in golden.prompts])
    tokens = logits[np.cumsum(lengths) - 1].argmax(-1)
    got = [tokens]
    for i in range(golden.greedy.shape[1] - 1):
        rows = [
            Chunk(slot, length + i, tokens[slot : slot + 1]) for slot, length in enumerate(lengths.tolist())
        ]
        (logits,) = engine.step([rows], [[]], R=ROWS, P=0)
        tokens = logits[: len(rows)].argmax(-1)
        got.append(tokens)
    np.testing.assert_array_equal(np.array(got).T, golden.greedy)
