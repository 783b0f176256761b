"""The prefill kernel for Hopper GPUs, interpreted on a CPU and lowered for one; tests/gpu runs it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxserve.ops.paged_attention import hopper
from tests.ops.cases import Heads, Pool, Prefill, tolerance

HEADS = (
    Heads(2, 1, 64, dtype="bfloat16"),
    Heads(2, 1, 128, dtype="bfloat16", window=150, softcap=20.0, sinks=True),
    Heads(2, 2, 128, page_size=64, dtype="float16", window=7),
)


def uneven_case(heads):
    """Blocks that start anywhere, whole and not, fresh and after a prefix; a gap; padding."""
    pool = Pool(heads, num_slots=4, pages_per_slot=640 // heads.page_size)
    chunks = ((2, 0, 200, 100), (0, 200, 10, 0), (3, 213, 130, 301))
    return Prefill(pool, num_tokens=384, chunks=chunks, block_size=hopper.BLOCK)


def arguments(case):
    """The case's, with NaN where a former owner of the pages may have left one: past each end."""
    query, keys, values, table, *blocks = case.arguments()
    page_size, values = case.pool.heads.page_size, np.array(values)
    for slot, _, length, cached in case.chunks:
        pages = case.pool.num_pages + np.asarray(table)[slot]
        for position in range(cached + length, len(pages) * page_size):
            values[pages[position // page_size], position % page_size] = np.nan
    return query, keys, jnp.asarray(values), table, *blocks


@pytest.mark.parametrize(
    "heads, tile",
    [(HEADS[0], hopper.Tile()), (HEADS[1], hopper.Tile()), (HEADS[2], hopper.Tile(keys=64, stages=3))],
    ids=str,
)
def test_blocks_equal_a_dense_softmax(monkeypatch, heads, tile):
    # The interpreter multiplies what lies in shared memory; these weights are in registers.
    def weighted_sum(weight, value_ref):
        return jnp.dot(weight, value_ref[...], preferred_element_type=jnp.float32)

    monkeypatch.setattr(hopper, "_weighted_sum", weighted_sum)
    case = uneven_case(heads)
    run = functools.partial(
        hopper.prefill, **case.pool.options(), tile=tile, interpret=plgpu.InterpretGPUParams()
    )
    out = np.asarray(jax.jit(run)(*arguments(case)), np.float32)
    np.testing.assert_allclose(out, case.expected(), rtol=0, atol=tolerance(heads))


@pytest.mark.parametrize("heads", HEADS[1:], ids=str)
def test_kernel_lowers_to_cuda_without_a_gpu(heads):
    case = uneven_case(heads)
    run = functools.partial(hopper.prefill, **case.pool.options())
    lowered = jax.jit(run).trace(*case.arguments()).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


def test_kernel_lowers_to_cuda_on_a_mesh_that_splits_heads():
    case = uneven_case(Heads(4, 2, 128, dtype="bfloat16"))
    mesh = jax.make_mesh((2,), ("tp",), axis_types=(AxisType.Auto,))
    heads, pool, whole = P(None, "tp"), P(None, None, "tp"), P()
    run = jax.shard_map(
        functools.partial(hopper.prefill, **case.pool.options()),
        mesh=mesh,
        in_specs=(heads, pool, pool, *[whole] * 5),
        out_specs=heads,
        check_vma=False,
    )
    lowered = jax.jit(run).trace(*case.arguments()).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


def test_what_it_does_not_compute_stays_with_the_other_kernel():
    def fits(P=256, K=128, page_size=16, dtype=jnp.bfloat16, block_size=hopper.BLOCK):
        query = jax.ShapeDtypeStruct((P, 4, K), jnp.bfloat16)
        return hopper.fits(query, jax.ShapeDtypeStruct((9, page_size, 2, K), dtype), block_size)

    assert fits() and fits(K=64, page_size=64, dtype=jnp.float16)
    assert not fits(P=64)
    assert not fits(P=260)
    assert not fits(K=256)
    assert not fits(page_size=4)
    assert not fits(page_size=256)
    assert not fits(dtype=jnp.float8_e4m3fn)
    assert not fits(block_size=64)
