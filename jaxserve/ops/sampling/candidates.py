"""Thresholds of the filters on a GPU, from a row's most promising chunks alone where that suffices.

The radix search of `fast` reads the whole vocabulary in every pass. But what the filters keep is
nearly always few tokens, and a chunk can only hold one of the M largest logits if its own maximum
is among the M largest maxima. So: take the M chunks with the largest maxima, keep their logits in
registers, and search there. Every logit above the M-th maximum is among them, so a threshold above
it is exact. Only where the search ends lower does its program go back to the whole row, in its own
loops: the GPU decides, nothing waits for the host.

Pallas-Triton, one program a row. A vocabulary sharded by the partitioner is gathered first; `fast`
without kernels is the version that stays sharded.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxserve.ops.sampling.rows import ordered, weights

CHUNK = 32  # logits: one line of memory
# 512 chunks hold any kept set of up to 511 tokens. On one H100, 32 and 256 rows of 128k with top_k
# and top_p: 98 and 374 us with 16 warps, 90 and 380 with 8, 109 and 411 with 4; 1024 chunks 154 and
# 561. Rows that go back to the whole vocabulary fare best with 16.
NUM_CHUNKS = 512
NUM_WARPS = 16
BITS = 2  # of the threshold that one pass settles
ROW_BLOCK = 4096  # logits of one iteration over a whole row


def least_kept(logits_RV, largest_R, divisor_R, top_k_R, top_p_R, *, interpret: bool = False):
    """The smallest logit that top_k and top_p keep, as `ordered`; [R] uint32. None is no filter."""
    R, V = logits_RV.shape
    chunk_Rm, complete_above_R = pick_chunks(logits_RV, NUM_CHUNKS, interpret=interpret)
    k_R = jnp.full((R,), V, jnp.int32) if top_k_R is None else top_k_R.astype(jnp.int32)
    k_R = jnp.where((k_R <= 0) | (k_R > V), V, k_R)
    p_R = jnp.ones((R,), jnp.float32) if top_p_R is None else top_p_R
    mass_R = weights(logits_RV, largest_R[:, None], divisor_R[:, None]).sum(axis=1)
    return pl.pallas_call(
        _threshold_kernel,
        grid=(R,),
        out_shape=jax.ShapeDtypeStruct((R,), jnp.uint32),
        compiler_params=plt.CompilerParams(num_warps=NUM_WARPS, num_stages=3),
        interpret=interpret,
        name="sampling_threshold",
    )(logits_RV, chunk_Rm, complete_above_R, largest_R, divisor_R, mass_R, k_R, p_R)


def top_k(logits_RV, k: int, *, interpret: bool = False):
    """`lax.top_k`, ties included, over the k chunks that hold the k largest; k <= NUM_CHUNKS."""
    R = logits_RV.shape[0]
    chunks_RnC = _chunks(logits_RV)
    m = _power_of_two(k)
    if chunks_RnC.shape[1] <= m:
        return lax.top_k(logits_RV, k)
    chunk_Rm, _ = pick_chunks(logits_RV, m, interpret=interpret)
    near_RmC = jnp.take_along_axis(chunks_RnC, chunk_Rm[:, :, None], axis=1)
    value_Rk, place_Rk = lax.top_k(near_RmC.reshape(R, -1), k)
    return value_Rk, jnp.take_along_axis(chunk_Rm, place_Rk // CHUNK, axis=1) * CHUNK + place_Rk % CHUNK


def pick_chunks(logits_RV, num_chunks: int, *, interpret: bool = False):
    """The chunks of CHUNK logits with the largest maxima, in order of id, the lower id among equals.

    Returns chunk ids [R, m] int32, m at most `num_chunks` (a power of two), and a bound [R] uint32:
    every logit whose `ordered` is above it lies in one of these chunks.
    """
    chunks_RnC = _chunks(logits_RV)
    R, n = chunks_RnC.shape[:2]
    if n <= num_chunks:
        m = _power_of_two(n)
        return jnp.broadcast_to(jnp.arange(m, dtype=jnp.int32), (R, m)), jnp.zeros((R,), jnp.uint32)
    return pl.pallas_call(
        functools.partial(_pick_kernel, num_chunks=num_chunks),
        grid=(R,),
        out_shape=(
            jax.ShapeDtypeStruct((R, num_chunks), jnp.int32),
            jax.ShapeDtypeStruct((R,), jnp.uint32),
        ),
        compiler_params=plt.CompilerParams(num_warps=8, num_stages=1),
        interpret=interpret,
        name="sampling_chunks",
    )(chunks_RnC.max(axis=2))


def _chunks(logits_RV):
    padded_RV = jnp.pad(logits_RV, ((0, 0), (0, -logits_RV.shape[1] % CHUNK)), constant_values=-jnp.inf)
    return padded_RV.reshape(logits_RV.shape[0], -1, CHUNK)


# ---- kernels ----


def _pick_kernel(maximum_ref, chunk_ref, bound_ref, *, num_chunks):
    r, n = pl.program_id(0), maximum_ref.shape[1]
    chunk = jnp.arange(_power_of_two(n))
    maximum = plt.load(maximum_ref.at[r, chunk], mask=chunk < n, other=jnp.float32(-jnp.inf))
    order = jnp.where(chunk < n, ordered(maximum), jnp.uint32(0))
    bound = _search(
        lambda *leasts: [_count(order >= least) for least in leasts],
        jnp.float32(num_chunks),
        jnp.int32(32 // BITS),
    )
    above, tied = order > bound, order == bound
    room = num_chunks - above.astype(jnp.int32).sum()
    picked = above | (tied & (jnp.cumsum(tied.astype(jnp.int32)) <= room))
    place = jnp.where(picked, jnp.cumsum(picked.astype(jnp.int32)) - 1, num_chunks)
    plt.store(chunk_ref.at[r, place], chunk, mask=picked)
    bound_ref[r] = bound


def _threshold_kernel(
    logits_ref, chunk_ref, bound_ref, largest_ref, divisor_ref, mass_ref, k_ref, p_ref, out_ref
):
    r, V = pl.program_id(0), logits_ref.shape[1]
    bound, largest, divisor = bound_ref[r], largest_ref[r], divisor_ref[r]
    k, p = k_ref[r], p_ref[r]

    lane = jnp.arange(chunk_ref.shape[1] * CHUNK)
    token = chunk_ref[r, lane // CHUNK] * CHUNK + lane % CHUNK
    logits = plt.load(logits_ref.at[r, token], mask=token < V, other=jnp.float32(-jnp.inf))
    order = ordered(logits)
    weight = weights(logits, largest, divisor)

    def whole_row(weigh, *leasts):
        """For each of `leasts` the sum of `weigh(logits, order)` over the row's logits from it up."""

        def add(block, totals):
            token = block * ROW_BLOCK + jnp.arange(ROW_BLOCK)
            logits = plt.load(logits_ref.at[r, token], mask=token < V, other=jnp.float32(-jnp.inf))
            order = ordered(logits)
            weight = jnp.where(token < V, weigh(logits, order), jnp.float32(0))
            return tuple(
                total + jnp.where(order >= least, weight, jnp.float32(0))
                for total, least in zip(totals, leasts)
            )

        zero = jnp.zeros((ROW_BLOCK,), jnp.float32)
        totals = lax.fori_loop(0, pl.cdiv(V, ROW_BLOCK), add, (zero,) * len(leasts))
        return [total.sum() for total in totals]

    def weigh_one(logits, order):
        return jnp.ones(logits.shape, jnp.float32)

    # A search that has nothing to do runs over no digit and gives 0, which keeps everything.
    def when(condition):
        return condition.astype(jnp.int32) * (32 // BITS)

    k_on = k < V
    target = k.astype(jnp.float32)
    kth = _search(lambda *leasts: [_count(order >= least) for least in leasts], target, when(k_on))
    k_far = k_on & (kth <= bound)
    far = _search(functools.partial(whole_row, weigh_one), target, when(k_far))
    kth = jnp.where(k_far, far, kth)

    def weigh(logits, order):
        return jnp.where(order >= kth, weights(logits, largest, divisor), jnp.float32(0))

    def sums_near(*leasts):
        return [jnp.where(order >= least, weight, jnp.float32(0)).sum() for least in leasts]

    weight = jnp.where(order >= kth, weight, jnp.float32(0))
    whole = lax.fori_loop(
        0, k_far.astype(jnp.int32), lambda _, total: whole_row(weigh, kth)[0], jnp.float32(0)
    )
    mass = jnp.where(k_on, jnp.where(k_far, whole, weight.sum()), mass_ref[r])
    p_on = p < 1
    nucleus = _search(sums_near, p * mass, when(p_on))
    p_far = p_on & (nucleus <= bound) & (~k_on | k_far)
    far = _search(functools.partial(whole_row, weigh), p * mass, when(p_far))
    out_ref[r] = jnp.maximum(kth, jnp.where(p_far, far, nucleus))


def _search(sums_from, target, digits):
    """The largest t whose sum reaches target, from the top over `digits` digits of BITS bits.

    `sums_from(*thresholds)` gives one sum a threshold, over what is not below it.
    """

    def settle_digit(i, found):
        shift = (32 - BITS - BITS * i).astype(jnp.uint32)
        reached = jnp.uint32(0)
        for total in sums_from(*(found | (jnp.uint32(digit) << shift) for digit in range(1, 1 << BITS))):
            reached += (total >= target).astype(jnp.uint32)
        return found | (reached << shift)

    return lax.fori_loop(jnp.int32(0), digits, settle_digit, jnp.uint32(0))


def _count(mask):
    return mask.astype(jnp.float32).sum()  # exact: far below 2**24


def _power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()
