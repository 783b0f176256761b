"""Sums and exchanges between the GPUs of one process, as a kernel like any other (Pallas-Triton).

XLA starts a collective from the host, all devices at once, and cuts a CUDA graph in two around it: in a
decode step of Llama-3.1-8B on four H200 the devices were busy for 1.8 of 6.7 ms. This kernel writes
straight into the other GPUs' memory, which peer access allows within a process, and so a step stays one
graph.

Every device has a mailbox: memory with a place for what each member of the group sends. A message is cut
into words of 16 bytes, two of data and behind each the number of the exchange. Halves of 8 bytes are
written and read at once, so a reader that finds the number it waits for has the data too: no fence, no
barrier, one way through the link. Source: the protocol LL of NCCL, as its documentation describes it.

Places are used in turn, two for each member. A device that begins exchange k + 2 has read all members'
words of k + 1, so they have begun it and are done with k, and the place of k is free. That holds for one
group whose members make the same exchanges one after another in the order of their numbers, which each says
by taking something from the one before; another group needs mailboxes of its own.
Numbers start again after 2**32 exchanges, a day or more; a message is then taken for another only where
nobody wrote since the exchange of that very number, 2**32 before.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike

WORD = 16  # bytes of a mailbox that carry 8 bytes of data
TILE = 128  # words of one program, each of them one thread's
TIMEOUT_NS = 60_000_000_000

# jax calls assembler text pure: it may go, move or run twice. So all it does may be done twice, and what
# must come later takes a result of what must come before.

# $0: zero, for whoever comes later. Then the lower and upper half of the mailbox's address, the word's
# place in it, two data and the number.
_SEND = """{
.reg .b64 base, at;
mov.b64 base, {$1, $2};
cvt.u64.u32 at, $3;
add.u64 at, at, base;
st.volatile.global.v4.u32 [at], {$4, $6, $5, $6};
mov.u32 $0, 0;
}"""
# $0: both data. A member that never sends ends the process (a trap), not the patience of all.
_RECEIVE = f"""{{
.reg .b64 base, at, begin, now;
.reg .b32 low, high, first, second;
.reg .pred missing;
mov.b64 base, {{$1, $2}};
cvt.u64.u32 at, $3;
add.u64 at, at, base;
mov.u64 begin, %globaltimer;
AGAIN:
mov.u64 now, %globaltimer;
sub.u64 now, now, begin;
setp.gt.u64 missing, now, {TIMEOUT_NS};
@missing trap;
ld.volatile.global.v4.u32 {{low, first, high, second}}, [at];
setp.ne.u32 missing, first, $4;
@missing bra AGAIN;
setp.ne.u32 missing, second, $4;
@missing bra AGAIN;
mov.b64 $0, {{low, high}};
}}"""
# Of both data, each: an assembler text has one result only (jax 0.11.2).
_LOW = "{ .reg .b32 other; mov.b64 {$0, other}, $1; }"
_HIGH = "{ .reg .b32 other; mov.b64 {other, $0}, $1; }"


def words(num: int, dtype: DTypeLike) -> int:
    """Words of a mailbox that `num` numbers take; 0: they cannot be sent."""
    size = jnp.dtype(dtype).itemsize
    return num * size // 8 if size in (2, 4) and num * size % (8 * TILE) == 0 else 0


@functools.partial(jax.jit, static_argnames=("capacity", "sums", "interpret"))
def exchange(
    x_PM: jax.Array,
    number: jax.Array,
    ahead: jax.Array,
    mailboxes_N2: jax.Array,
    me: jax.Array,
    after: jax.Array,
    *,
    capacity: int,
    sums: bool,
    interpret: bool = False,
) -> jax.Array:
    """What the members of a group have for each other.

    Args:
        x_PM: [N, M], a row for each member, or [1, M], the same for all; a type of 2 or 4 bytes, and M what
            `words` takes.
        number, ahead: int32 scalars, whose sum is the number of this exchange: one more than of the group's
            last. 0 is none. `ahead` is to be a constant: adding it outside would be a kernel of its own.
        mailboxes_N2: int32 [N, 2], lower and upper half of the address of each member's mailbox, which has
            2 * N * capacity words and was zeros in the beginning.
        me: int32 scalar, this device's row of them.
        after: what the exchange before this one made, in any shape. Nothing is read of it, but XLA would run
            exchanges that do not depend on each other in an order of its own.
        capacity: words of a message, at most.
        sums: add what came, in float32 and in the members' order, so that all get the same sum.

    Returns: [N, M], a row from each member, or [M], their sum, of x's type.
    """
    P, M = x_PM.shape
    N = mailboxes_N2.shape[0]
    num_words = words(M, x_PM.dtype)
    assert 0 < num_words <= capacity and P in (1, N), (x_PM.shape, x_PM.dtype, N, capacity)
    return pl.pallas_call(
        functools.partial(_kernel, capacity=capacity, sums=sums),
        grid=(num_words // TILE,),
        out_shape=jax.ShapeDtypeStruct((M,) if sums else (N, M), x_PM.dtype),
        compiler_params=plt.CompilerParams(num_warps=TILE // 32, num_stages=1),
        interpret=interpret,
        name="exchange",
    )(x_PM, number.reshape(1), ahead.reshape(1), mailboxes_N2, me.reshape(1), after)


def _kernel(x_ref, number_ref, ahead_ref, mailboxes_ref, me_ref, _, out_ref, *, capacity, sums):
    (P, _), N, dtype = x_ref.shape, mailboxes_ref.shape[0], x_ref.dtype
    tile, me, number = pl.program_id(0), me_ref[0], number_ref[0] + ahead_ref[0]
    per_word = 8 // dtype.itemsize
    # A word's numbers lie TILE apart, so that neighbouring threads read neighbouring numbers.
    columns = [(tile * per_word + part) * TILE + jnp.arange(TILE) for part in range(per_word)]
    numbers = jnp.full((TILE,), number)

    def place(sender):
        word = ((number & 1) * N + sender) * capacity + tile * TILE + jnp.arange(TILE)
        return word * WORD

    def mailbox(member):
        return [jnp.full((TILE,), mailboxes_ref[member, half]) for half in range(2)]

    sent = jnp.zeros((TILE,), jnp.int32)
    for member in range(N):
        row = member if P == N else 0
        data = _pack([x_ref[row, column] for column in columns])
        sent |= _asm(_SEND, "=r,r,r,r,r,r,r", np.int32, *mailbox(member), place(me), *data, numbers)
    total = [jnp.zeros((TILE,), jnp.float32) for _ in columns]
    for sender in range(N):
        both = _asm(_RECEIVE, "=l,r,r,r,r", np.int64, *mailbox(me), place(sender) + sent, numbers)
        came = _unpack([_asm(half, "=r,l", np.int32, both) for half in (_LOW, _HIGH)], dtype)
        if sums:
            total = [a + b.astype(jnp.float32) for a, b in zip(total, came)]
            continue
        for column, value in zip(columns, came):
            out_ref[sender, column] = value
    if sums:
        for column, value in zip(columns, total):
            out_ref[column] = value.astype(dtype)


def _asm(text: str, constraints: str, dtype: DTypeLike, *args: jax.Array) -> jax.Array:
    """The result of `text` for each thread."""
    out = [jax.ShapeDtypeStruct((TILE,), dtype)]
    (result,) = plt.elementwise_inline_asm(
        text, args=args, constraints=constraints, pack=1, result_shape_dtypes=out
    )
    return result


def _pack(numbers: list[jax.Array]) -> list[jax.Array]:
    """Two int32 of two numbers of 4 bytes or four of 2."""
    if len(numbers) == 2:
        return [jax.lax.bitcast_convert_type(x, jnp.int32) for x in numbers]
    half = [jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.int32) for x in numbers]
    return [half[0] | half[1] << 16, half[2] | half[3] << 16]


def _unpack(data: list[jax.Array], dtype: DTypeLike) -> list[jax.Array]:
    if jnp.dtype(dtype).itemsize == 4:
        return [jax.lax.bitcast_convert_type(x, dtype) for x in data]
    halves = [half for x in data for half in (x & 0xFFFF, jax.lax.shift_right_logical(x, 16))]
    return [jax.lax.bitcast_convert_type(x.astype(jnp.uint16), dtype) for x in halves]
