"""Sums and exchanges between the GPUs of one process, as a kernel like any other (Pallas-Triton).

XLA starts a collective from the host, all devices at once, and cuts a CUDA graph in two around it: in a
decode step of Llama-3.1-8B on four H200 the devices were busy for 1.8 of 6.7 ms. This kernel writes
straight into the other GPUs' memory, which peer access allows within a process, and so a step stays one
graph.

Every device has a mailbox: memory with a place for what each member of the group sends. A message is cut
into words of 16 bytes, 12 of data and the number of the exchange. A word is written and read at once, so a
reader that finds the number it waits for has the data too: no fence, no barrier, one way through the link.
Source: the protocol LL of NCCL, as its documentation describes it, with the 16 bytes that PTX (8.3 and
later) moves in one access in place of its 8.

Places are used in turn, two for each member. A device that begins exchange k + 2 has read all members'
words of k + 1, so they have begun it and are done with k, and the place of k is free. That holds for one
group whose members make the same exchanges one after another in the order of their numbers, which each says
by taking something from the one before; another group needs mailboxes of its own. A sum in parts is two
exchanges in one kernel, each program going from the first to the second by itself: it sends a word of
k + 1 after it has read all members' words of k at the same place, and the kernel ends when all have.
A program waits for the same program of other members only, and those start in order, so the first one that
is not done anywhere runs everywhere.
Numbers start again after 2**32 exchanges, a day or more; a message is then taken for another only where
nobody wrote since the exchange of that very number, 2**32 before.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike

WORD, DATA = 16, 12  # bytes of a mailbox, and those of them that carry data
TILE = 128  # words of one program, each of them one thread's
TIMEOUT_NS = 60_000_000_000

Kind = Literal["gather", "sum", "sum in parts"]

# jax calls assembler text pure: it may go, move or run twice. So all it does may be done twice, and what
# must come later takes a result of what must come before. A text has one result only (jax 0.11.2).

_ADDRESS = """.reg .b64 base, at;
mov.b64 base, {$1, $2};
cvt.u64.u32 at, $3;
add.u64 at, at, base;"""
# $0: zero, for whoever comes later. Then the lower and upper half of the mailbox's address, the word's
# place in it, three data and the number.
_SEND = f"""{{
{_ADDRESS}
.reg .b64 low, high;
.reg .b128 word;
mov.b64 low, {{$4, $5}};
mov.b64 high, {{$6, $7}};
mov.b128 word, {{low, high}};
st.relaxed.sys.global.b128 [at], word;
mov.u32 $0, 0;
}}"""
# $0: the first two data. A member that never sends ends the process (a trap), not the patience of all.
_RECEIVE = f"""{{
{_ADDRESS}
.reg .b64 begin, now, low, high;
.reg .b128 word;
.reg .b32 third, number;
.reg .pred missing;
mov.u64 begin, %globaltimer;
AGAIN:
mov.u64 now, %globaltimer;
sub.u64 now, now, begin;
setp.gt.u64 missing, now, {TIMEOUT_NS};
@missing trap;
ld.relaxed.sys.global.b128 word, [at];
mov.b128 {{low, high}}, word;
mov.b64 {{third, number}}, high;
setp.ne.u32 missing, number, $4;
@missing bra AGAIN;
mov.b64 $0, low;
}}"""
# $0: the third one, of a word that has come.
_THIRD = f"""{{
{_ADDRESS}
ld.relaxed.sys.global.b32 $0, [at+8];
}}"""
_FIRST = "{ .reg .b32 other; mov.b64 {$0, other}, $1; }"
_SECOND = "{ .reg .b32 other; mov.b64 {other, $0}, $1; }"


def words(num: int, dtype: DTypeLike) -> int:
    """Words of a mailbox that `num` numbers take; 0: they cannot be sent."""
    size = jnp.dtype(dtype).itemsize
    return _tiles(num, size) * TILE if size in (2, 4) else 0


def _tiles(num: int, size: int) -> int:
    return -(-num * size // (DATA * TILE))


@functools.partial(jax.jit, static_argnames=("capacity", "kind", "interpret"))
def exchange(
    x_PM: jax.Array,
    number: jax.Array,
    ahead: jax.Array,
    mailboxes_N2: jax.Array,
    me: jax.Array,
    after: jax.Array,
    *,
    capacity: int,
    kind: Kind,
    interpret: bool = False,
) -> jax.Array:
    """What the members of a group have for each other.

    Args:
        x_PM: [N, M], a row for each member, or [1, M], the same for all; a type of 2 or 4 bytes.
        number, ahead: int32 scalars, whose sum is the number of this exchange: one more than of the group's
            last. 0 is none. `ahead` is to be a constant: adding it outside would be a kernel of its own.
        mailboxes_N2: int32 [N, 2], lower and upper half of the address of each member's mailbox, which has
            2 * N * capacity words and was zeros in the beginning.
        me: int32 scalar, this device's row of them.
        after: what the exchange before this one made, in any shape. Nothing is read of it, but XLA would run
            exchanges that do not depend on each other in an order of its own.
        capacity: words of a message, at most.
        kind: "gather", the rows that came; "sum" of them; "sum in parts", which is a sum of all x_PM: each
            member sums a row and sends that to all. This one takes two numbers.

    Sums are made in float32 and in the members' order, so that all get the same.

    Returns: [N, M], a row from each member, or [M], their sum, of x's type.
    """
    P, M = x_PM.shape
    N = mailboxes_N2.shape[0]
    assert 0 < words(M, x_PM.dtype) <= capacity and P in (1, N), (x_PM.shape, x_PM.dtype, N, capacity)
    return pl.pallas_call(
        functools.partial(_kernel, capacity=capacity, kind=kind),
        grid=(_tiles(M, x_PM.dtype.itemsize),),
        out_shape=jax.ShapeDtypeStruct((M,) if kind == "sum" else (N, M), x_PM.dtype),
        compiler_params=plt.CompilerParams(num_warps=TILE // 32, num_stages=1),
        interpret=interpret,
        name="exchange",
    )(x_PM, number.reshape(1), ahead.reshape(1), mailboxes_N2, me.reshape(1), after)


def _kernel(x_ref, number_ref, ahead_ref, mailboxes_ref, me_ref, _, out_ref, *, capacity, kind):
    (P, M), N, dtype = x_ref.shape, mailboxes_ref.shape[0], x_ref.dtype
    tile, me, number = pl.program_id(0), me_ref[0], number_ref[0] + ahead_ref[0]
    # A word's numbers lie TILE apart, so that neighbouring threads read neighbouring numbers.
    per_word = DATA // dtype.itemsize
    columns = [(tile * per_word + part) * TILE + jnp.arange(TILE) for part in range(per_word)]

    def swap(number: jax.Array, data_for: Callable[[int], list[jax.Array]]) -> list[list[jax.Array]]:
        """What each member sent, once all was sent to them, by parts of a word."""
        numbers = jnp.full((TILE,), number)

        def place(sender):
            word = ((number & 1) * N + sender) * capacity + tile * TILE + jnp.arange(TILE)
            return word * WORD

        def mailbox(member):
            return [jnp.full((TILE,), mailboxes_ref[member, half]) for half in range(2)]

        sent = jnp.zeros((TILE,), jnp.int32)
        for member in range(N):
            data = _pack(data_for(member))
            sent |= _asm(_SEND, "=r,r,r,r,r,r,r,r", np.int32, *mailbox(member), place(me), *data, numbers)
        came = []
        for sender in range(N):
            at = [*mailbox(me), place(sender) + sent]
            both = _asm(_RECEIVE, "=l,r,r,r,r", np.int64, *at, numbers)
            first, second = (_asm(half, "=r,l", np.int32, both) for half in (_FIRST, _SECOND))
            third = _asm(_THIRD, "=r,r,r,r,r", np.int32, *at, first)
            came.append(_unpack([first, second, third], dtype))
        return came

    def read(member):
        row = member if P == N else 0
        zero = jnp.zeros((), dtype)
        return [plt.load(x_ref.at[row, column], mask=column < M, other=zero) for column in columns]

    def write(at, values):
        for column, value in zip(columns, values):
            plt.store(out_ref.at[(*at, column)], value.astype(dtype), mask=column < M)

    came = swap(number, read)
    if kind != "gather":
        total = [jnp.zeros((TILE,), jnp.float32) for _ in columns]
        for values in came:
            total = [a + b.astype(jnp.float32) for a, b in zip(total, values)]
        if kind == "sum":
            write((), total)
            return
        part = [value.astype(dtype) for value in total]
        came = swap(number + 1, lambda member: part)
    for sender, values in enumerate(came):
        write((sender,), values)


def _asm(text: str, constraints: str, dtype: DTypeLike, *args: jax.Array) -> jax.Array:
    """The result of `text` for each thread."""
    out = [jax.ShapeDtypeStruct((TILE,), dtype)]
    (result,) = plt.elementwise_inline_asm(
        text, args=args, constraints=constraints, pack=1, result_shape_dtypes=out
    )
    return result


def _pack(numbers: list[jax.Array]) -> list[jax.Array]:
    """Three int32 of three numbers of 4 bytes or six of 2."""
    if len(numbers) == 3:
        return [jax.lax.bitcast_convert_type(x, jnp.int32) for x in numbers]
    half = [jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.int32) for x in numbers]
    return [low | high << 16 for low, high in zip(half[::2], half[1::2])]


def _unpack(data: list[jax.Array], dtype: DTypeLike) -> list[jax.Array]:
    if jnp.dtype(dtype).itemsize == 4:
        return [jax.lax.bitcast_convert_type(x, dtype) for x in data]
    halves = [half for x in data for half in (x & 0xFFFF, jax.lax.shift_right_logical(x, 16))]
    return [jax.lax.bitcast_convert_type(x.astype(jnp.uint16), dtype) for x in halves]
