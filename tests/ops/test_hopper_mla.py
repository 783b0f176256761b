"""Latent attention for Hopper GPUs, interpreted on a CPU and lowered for one; tests/gpu runs it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxserve.ops import backend, mla_attention
from jaxserve.ops.mla_attention import hopper
from tests.ops.test_mla_attention import PAGE, Latents, blocks, expected_prefill, options

NUM_TOKENS, BLOCK = 64, 16
# One block of keys and more, odd and even; starts off a multiple of 8; gaps; a prefix that ends with a block.
CHUNKS = ((2, 0, 30, 100), (0, 31, 5, 0), (3, 40, 3, 250), (1, 50, 1, 63))  # slot, start, length, pos


def latents(H, L, dtype="bfloat16"):
    return Latents(H=H, L=L, K=64, dtype=dtype, pages_per_slot=40)


def arguments(case, size=BLOCK, chunks=CHUNKS):
    """The case's, with NaN where a former owner of the pages may have left one: past each end."""
    *queries, latent_pages, rope_pages, table = case.arguments(NUM_TOKENS)
    pools = [np.array(pool) for pool in (latent_pages, rope_pages)]
    for slot, _, length, pos in chunks:
        pages = case.num_pages + case.table[slot]
        for position in range(pos + length, len(pages) * PAGE):
            for pool in pools:
                pool[pages[position // PAGE], position % PAGE] = np.nan
    return *queries, *map(jnp.asarray, pools), table, *blocks(chunks, size)


def expected(case, chunks=CHUNKS):
    return expected_prefill(case, NUM_TOKENS, chunks)


def accumulate(out, weight, value_ref, meanwhile=None, like=()):
    """The interpreter knows no accumulator with a first value, and no weights in registers."""
    del like

    def product(accumulator):
        plgpu.wgmma(accumulator, weight, value_ref)
        results = () if meanwhile is None else meanwhile()
        return accumulator[...], results

    accumulator = plgpu.WGMMAAccumulatorRef(out.shape, jnp.float32)
    summed, results = pl.run_scoped(product, accumulator)
    return out + summed, results


@pytest.fixture
def interpreted(monkeypatch):
    """`interpret` of the kernel; its race detector fails what another warpgroup may not have written yet."""
    monkeypatch.setattr(hopper, "_accumulate", accumulate)
    return plgpu.InterpretGPUParams(detect_races=True)


@pytest.mark.parametrize(
    "case, chunks",
    [(latents(8, 128), CHUNKS), (latents(16, 256, "float16"), CHUNKS), (latents(128, 128), CHUNKS[1:])],
    ids=str,
)
def test_blocks_equal_a_dense_softmax(interpreted, case, chunks):
    run = functools.partial(hopper.prefill, block_size=BLOCK, **options(case), interpret=interpreted)
    out = np.asarray(jax.jit(run)(*arguments(case, chunks=chunks)), np.float32)
    np.testing.assert_allclose(out, expected(case, chunks), rtol=0, atol=case.tolerance())
    assert not gpu_callbacks.get_races().races_found


ROWS = ((3, 1, 0, 2), (1, 0, 256, 190))  # slots, context lengths


def run_decode(case, **more):
    rows = [jnp.asarray(x, jnp.int32) for x in ROWS]
    run = functools.partial(hopper.decode, **options(case), **more)
    return np.asarray(jax.jit(run)(*case.arguments(len(ROWS[0])), *rows), np.float32)


def expected_decode(case):
    """A row of no tokens keeps its query."""
    query = case.queries(len(ROWS[0]))
    out = np.array(query[0], np.float64)
    for r, (slot, length) in enumerate(zip(*ROWS)):
        if length:
            out[r] = case.dense([q[r] for q in query], slot, length)
    return out


def test_decode_equals_a_dense_softmax(interpreted):
    case = latents(64, 128)
    out = run_decode(case, interpret=interpreted)
    np.testing.assert_allclose(out, expected_decode(case), rtol=0, atol=case.tolerance())


DEEPSEEK = functools.partial(latents, L=512)


@pytest.mark.parametrize("H", [8, 16, 128])
def test_kernel_lowers_to_cuda_without_a_gpu(H):
    case = DEEPSEEK(H)
    run = functools.partial(hopper.prefill, block_size=128, **options(case))
    lowered = jax.jit(run).trace(*arguments(case, 128)).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


def test_kernel_lowers_to_cuda_on_a_mesh_that_splits_heads():
    case = DEEPSEEK(16)
    mesh = jax.make_mesh((2,), ("tp",), axis_types=(AxisType.Auto,))
    heads, whole = P(None, "tp"), P()
    run = jax.shard_map(
        functools.partial(hopper.prefill, block_size=BLOCK, **options(case)),
        mesh=mesh,
        in_specs=(heads, heads, *[whole] * 7),
        out_specs=heads,
        check_vma=False,
    )
    lowered = jax.jit(run).trace(*arguments(case)).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


def shapes(tokens=64, H=16, L=512, K=64, page_size=16, dtype=jnp.bfloat16):
    queries = (jax.ShapeDtypeStruct((tokens, H, width), jnp.bfloat16) for width in (L, K))
    return *queries, jax.ShapeDtypeStruct((9, page_size, L), dtype)


def test_what_it_does_not_compute_stays_with_the_other_kernel():
    def fits(**more):
        return hopper.fits(*shapes(**more))

    assert fits() and fits(H=8) and fits(H=128, page_size=64, dtype=jnp.float16) and fits(L=128)
    assert not fits(tokens=3)
    assert not fits(H=4)
    assert not fits(H=20)
    assert not fits(H=48)
    assert not fits(L=96)
    assert not fits(L=640)
    assert not fits(K=128)
    assert not fits(page_size=4)
    assert not fits(page_size=128)
    assert not fits(dtype=jnp.float8_e4m3fn)


def test_decode_takes_it_where_rows_of_64_heads_fill_a_gpu():
    assert hopper.fits_decode(*shapes(H=128), num_rows=32)
    assert not hopper.fits_decode(*shapes(H=128), num_rows=31)
    assert not hopper.fits_decode(*shapes(H=16), num_rows=512)
    assert not hopper.fits_decode(*shapes(H=128, dtype=jnp.float8_e4m3fn), num_rows=64)


@pytest.mark.parametrize("is_supported", [True, False])
def test_a_gpu_that_can_gets_the_kernel_for_hopper(monkeypatch, is_supported):
    monkeypatch.setattr(mla_attention, "is_supported", lambda: is_supported)
    for where in (mla_attention.hopper, mla_attention.fast):
        name = where.__name__.rpartition(".")[2]
        for call in ("prefill", "decode"):
            monkeypatch.setattr(where, call, lambda *a, name=name, **more: name)
    case = DEEPSEEK(128)
    name = "hopper" if is_supported else "fast"
    with backend.use("fast"):
        assert mla_attention.prefill(*arguments(case), block_size=BLOCK, **options(case)) == name
        rows = [jnp.zeros(NUM_TOKENS, jnp.int32)] * 2
        assert mla_attention.decode(*case.arguments(NUM_TOKENS), *rows, **options(case)) == name
