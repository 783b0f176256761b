"""Lightning attention in blocks against the recurrence, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.layers.lightning import decode, prefill, slopes, write_rows

HEADS, WIDTH, BLOCK = 3, 5, 8
SLOPES = np.array([0.9, 0.06, 1e-5], np.float32)  # from one that forgets at once to one that never does
TOLERANCE = 2e-5  # float32 sums of some fifty terms of size 1 to 10, in another order


def recur(query_THK, key_THK, value_THK, state_HKK):
    """The definition, in float64."""
    out, fade = [], np.exp(-SLOPES.astype(np.float64))[:, None, None]
    for query, key, value in zip(query_THK, key_THK, value_THK):
        state_HKK = fade * state_HKK + key[:, :, None] * value[:, None, :]
        out.append(np.einsum("hk,hkv->hv", query, state_HKK))
    return np.array(out), state_HKK


def draw(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def blocks_of(sequences):
    """Pack (slot, position, tokens, start state) into blocks; garbage where no token is."""
    parts = []
    for slot, position, (query, key, value), state in sequences:
        for at in range(0, len(query), BLOCK):
            piece = [x[at : at + BLOCK] for x in (query, key, value)]
            length = len(piece[0])
            padding = np.full((BLOCK - length, HEADS, WIDTH), np.nan, np.float32)
            parts.append((*(np.concatenate([x, padding]) for x in piece), state, slot, length, position + at))
    return [np.array(x) for x in zip(*parts)]


def run(sequences, num_padding=0):
    query, key, value, state, slot, length, position = blocks_of(sequences)
    for _ in range(num_padding):  # blocks without a token, of nobody
        query, key, value, state = (np.concatenate([x, x[-1:] * np.nan]) for x in (query, key, value, state))
        slot, length, position = (np.append(x, y) for x, y in ((slot, -1), (length, 0), (position, 0)))
    as_int = (jnp.asarray(x, jnp.int32) for x in (slot, length, position))
    out, after = jax.jit(prefill)(query, key, value, state, SLOPES, *as_int)
    return np.asarray(out), np.asarray(after), length


@pytest.mark.parametrize("lengths", [(1,), (8,), (9,), (40,), (3, 17, 8), (25, 1, 16)], ids=str)
def test_blocks_give_what_the_recurrence_gives(lengths):
    rng = np.random.default_rng(sum(lengths))
    sequences = [
        (
            slot,
            100 * slot,
            [draw(rng, length, HEADS, WIDTH) for _ in range(3)],
            draw(rng, HEADS, WIDTH, WIDTH),
        )
        for slot, length in enumerate(lengths)
    ]
    out, after, counts = run(sequences, num_padding=2)
    block = 0
    for _, _, tokens, state in sequences:
        want, want_state = recur(*tokens, state)
        blocks = -(-len(want) // BLOCK)
        got = np.concatenate([out[b, : counts[b]] for b in range(block, block + blocks)])
        block += blocks
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(after[block - 1], want_state, rtol=0, atol=TOLERANCE)


def test_sequence_in_two_uneven_chunks_of_one_step_goes_on_where_it_stood():
    """The state after the first chunk is right too: it may be kept."""
    rng = np.random.default_rng(0)
    tokens, state = [draw(rng, 21, HEADS, WIDTH) for _ in range(3)], draw(rng, HEADS, WIDTH, WIDTH)
    chunks = [(2, 64, [x[:11] for x in tokens], state), (2, 75, [x[11:] for x in tokens], state)]
    out, after, counts = run(chunks)
    want, want_state = recur(*tokens, state)
    got = np.concatenate([x[:n] for x, n in zip(out, counts)])
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(after[-1], want_state, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(after[1], recur(*(x[:11] for x in tokens), state)[1], rtol=0, atol=TOLERANCE)


def test_decoding_goes_on_from_a_prefill():
    rng = np.random.default_rng(1)
    tokens, state = (
        [draw(rng, 14, HEADS, WIDTH) for _ in range(3)],
        np.zeros((HEADS, WIDTH, WIDTH), np.float32),
    )
    _, after, _ = run([(0, 0, [x[:10] for x in tokens], state)])
    want, _ = recur(*tokens, state)
    now = after[-1][None]
    for t in range(10, 14):
        out, now = decode(*(jnp.asarray(x[t : t + 1]) for x in tokens), now, SLOPES)
        np.testing.assert_allclose(out[0], want[t], rtol=0, atol=TOLERANCE)


def test_long_sequence_in_a_head_that_never_forgets_stays_exact_enough():
    rng = np.random.default_rng(2)
    tokens = [draw(rng, 800, HEADS, WIDTH) for _ in range(3)]
    out, _, counts = run([(0, 0, tokens, np.zeros((HEADS, WIDTH, WIDTH), np.float32))])
    want, _ = recur(*tokens, np.zeros((HEADS, WIDTH, WIDTH)))
    got = np.concatenate([x[:n] for x, n in zip(out, counts)])
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())


def test_row_minus_one_is_written_nowhere():
    pool = jnp.zeros((3, 2, 1, 1, 1))
    written = write_rows(pool, jnp.array([-1, 2, -1]), jnp.int32(1), jnp.ones((3, 1, 1, 1)))
    assert np.asarray(written).ravel().tolist() == [0, 0, 0, 0, 0, 1]


def test_slopes_halve_a_head_apart_in_eight_heads():
    assert slopes(8, 1.0) == (0.5, 0.25, 0.125, 0.0625, 2**-5, 2**-6, 2**-7, 2**-8)
    assert slopes(16, 0.5)[1::2] == tuple(0.5 * s for s in slopes(8, 1.0))
