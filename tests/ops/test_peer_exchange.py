"""The kernel of exchanges, with threads as its members and an array as their memory.

What its assembler text does is done by `Memory` here; tests/gpu/test_exchange.py has it run.
"""

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.ops import peer_exchange
from jaxserve.ops.peer_exchange import TILE, WORD, exchange, words

CAPACITY = 2 * TILE


class Memory:
    """The members' mailboxes; member m's begins at address m << 32."""

    def __init__(self, num_members):
        self.bytes = np.zeros((num_members, 2 * num_members * CAPACITY * WORD), np.uint8)
        self.addresses = jnp.asarray([[0, member] for member in range(num_members)], jnp.int32)
        self.lock = threading.Lock()

    def word(self, high, at):
        return self.bytes[int(high), int(at) : int(at) + WORD].view(np.uint32)

    def asm(self, text, constraints, dtype, *args):
        if text == peer_exchange._SEND:
            return jax.pure_callback(self.send, jax.ShapeDtypeStruct((TILE,), jnp.int32), *args)
        if text == peer_exchange._RECEIVE:  # CPUs have no int64 here
            return jax.pure_callback(self.receive, jax.ShapeDtypeStruct((2, TILE), jnp.int32), *args)
        if text == peer_exchange._THIRD:
            return jax.pure_callback(self.third, jax.ShapeDtypeStruct((TILE,), jnp.int32), *args)
        (both,) = args
        return both[[peer_exchange._FIRST, peer_exchange._SECOND].index(text)]

    def send(self, low, high, at, *data):
        with self.lock:
            for thread in range(TILE):
                self.word(high[thread], at[thread])[:] = [np.asarray(x).view(np.uint32)[thread] for x in data]
        return np.zeros(TILE, np.int32)

    def receive(self, low, high, at, number):
        out = np.zeros((2, TILE), np.uint32)
        until = time.monotonic() + 60
        for thread in range(TILE):
            wanted = np.asarray(number).view(np.uint32)[thread]
            word = self.word(high[thread], at[thread])
            while word[3] != wanted:
                assert time.monotonic() < until, "a member never sent"
                time.sleep(0.001)
            out[:, thread] = word[:2]
        return out.view(np.int32)

    def third(self, low, high, at, first):
        words = [self.word(high[thread], at[thread])[2] for thread in range(TILE)]
        return np.array(words, np.uint32).view(np.int32)


def exchange_all(memory, rounds, first=1):
    """What each member gets in each round; a round is what the members give, and the kind of exchange."""
    results = [[] for _ in range(len(memory.bytes))]

    def run(member):
        number = first
        for inputs, kind in rounds:
            got = exchange(
                jax.device_put(inputs[member], jax.devices()[member]),
                jnp.asarray(np.int64(number - 3).astype(np.int32)),
                jnp.int32(3),
                memory.addresses,
                jnp.int32(member),
                jnp.zeros(1),
                capacity=CAPACITY,
                kind=kind,
                interpret=True,
            )
            number += 2 if kind == "sum in parts" else 1
            results[member].append(np.asarray(got))

    threads = [threading.Thread(target=run, args=(member,)) for member in range(len(memory.bytes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.fixture
def memory(request, monkeypatch):
    memory = Memory(request.param)
    monkeypatch.setattr(peer_exchange, "_asm", memory.asm)
    jax.clear_caches()  # the kernel was, and will be, traced with another text
    yield memory
    jax.clear_caches()


def draw(rng, members, parts, num, dtype):
    return [jnp.asarray(rng.normal(size=(parts, num)), dtype) for _ in range(members)]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("memory", [2], indirect=True)
def test_members_get_what_the_others_have_for_them(memory, dtype):
    """Of a message that fills its last word in part, and of one of several programs."""
    rng = np.random.default_rng(0)
    same, each = (
        draw(rng, 2, 1, CAPACITY * 12 // jnp.dtype(dtype).itemsize, dtype),
        draw(rng, 2, 2, 100, dtype),
    )
    for first in (1, 2**31 - 2):  # numbers start again from below zero
        kinds = "gather", "gather", "sum", "sum", "sum in parts", "sum"
        rounds = list(zip((same, each, same, each, each, same), kinds))
        got = exchange_all(memory, rounds, first)
        for member in range(2):
            gathered, swapped, summed, scattered, everywhere, again = got[member]
            np.testing.assert_array_equal(gathered, np.concatenate(same))
            np.testing.assert_array_equal(swapped, np.stack([x[member] for x in each]))
            wide = [np.asarray(x, np.float32) for x in same]
            np.testing.assert_array_equal(summed, (wide[0] + wide[1])[0].astype(dtype))
            np.testing.assert_array_equal(again, summed)
            wide = [np.asarray(x, np.float32) for x in each]
            np.testing.assert_array_equal(scattered, (wide[0] + wide[1])[member].astype(dtype))
            np.testing.assert_array_equal(everywhere, (wide[0] + wide[1]).astype(dtype))


@pytest.mark.parametrize("kind", ["sum", "sum in parts"])
@pytest.mark.parametrize("memory", [4], indirect=True)
def test_sums_of_four_members_are_the_same_for_all(memory, kind):
    inputs = draw(np.random.default_rng(1), 4, 1 if kind == "sum" else 4, 4 * TILE, jnp.bfloat16)
    got = exchange_all(memory, [(inputs, kind)])
    wide = sum(np.asarray(x, np.float32) for x in inputs)
    for (result,) in got:
        np.testing.assert_array_equal(result, (wide[0] if kind == "sum" else wide).astype(jnp.bfloat16))


@pytest.mark.parametrize(
    "num, dtype, expected",
    [
        (1, jnp.bfloat16, TILE),
        (6 * TILE, jnp.bfloat16, TILE),
        (6 * TILE + 1, jnp.bfloat16, 2 * TILE),
        (3 * TILE, jnp.int32, TILE),
        (0, jnp.float32, 0),
        (8 * TILE, jnp.int8, 0),
        (8 * TILE, jnp.float64, 0),
    ],
)
def test_words_are_of_whole_tiles_and_of_types_that_fit(num, dtype, expected):
    with jax.enable_x64(True):
        assert words(num, dtype) == expected
