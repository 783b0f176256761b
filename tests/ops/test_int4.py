"""Integers of four bits with scales and zeros for groups: where they lie, what they are worth, products."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType, Mesh

from jaxserve.mesh import AXES
from jaxserve.ops import four_bits, int4, int4_product
from jaxserve.ops.grouped_gemm.hopper_packed import Tile
from jaxserve.ops.int4_product import Cut, Weight
from tests.ops.cases import H100


def made(N: int, K: int, group: int, dtype: Any = "bfloat16") -> tuple[Weight, np.ndarray]:
    """(a weight, what it is worth: float32 [N, K])."""
    rng, dtype = np.random.default_rng(0), jnp.dtype(dtype)
    codes, zeros = rng.integers(0, 16, (N, K)).astype(np.uint8), rng.integers(0, 17, (N, K // group))
    scales = rng.uniform(0.5, 2, (N, K // group)).astype(dtype)
    packed = int4.pack(codes), int4.pack_scales(scales, dtype), int4.pack_zeros(zeros, dtype)
    steps = codes.astype(np.float32) - np.repeat(zeros, group, axis=1)
    worth = (steps * np.repeat(scales.astype(np.float32), group, axis=1)).astype(dtype)
    return Weight(*map(jnp.asarray, packed)), worth.astype(np.float32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("N, K, group", [(64, 128, 128), (192, 256, 32), (128, 192, 64)])
def test_a_number_is_its_distance_from_zero_in_steps_of_its_scale(N, K, group, dtype):
    weight, worth = made(N, K, group, dtype)
    np.testing.assert_array_equal(np.asarray(jax.jit(int4.widen)(*weight), np.float32), worth)


def test_a_thread_has_what_a_tensor_core_takes_from_it():
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 16, (64, 32)).astype(np.uint8)
    scales = np.arange(64, dtype=np.float32)[:, None]
    packed, of_rows = int4.pack(codes), int4.pack_scales(scales, jnp.bfloat16)
    for thread in (0, 1, 6, 31, 77, 127):
        row, column = 16 * (thread // 32) + thread % 32 // 4, 2 * (thread % 4)
        mine = packed[0].reshape(-1)[8 * thread : 8 * thread + 8].view(np.uint32)
        for of_16, word in enumerate(mine):
            for pair, (down, right) in enumerate(((0, 0), (8, 0), (0, 8), (8, 8))):
                bits = four_bits.shifted(int(word), int4.PARTS[pair][0][1]) & 0x000F000F
                begin = 16 * of_16 + column + right
                assert [bits & 15, bits >> 16] == list(codes[row + down, begin : begin + 2])
        at = 2 * (thread // 4)
        assert list(of_rows[0, 0, at : at + 2].astype(np.float32)) == [row, row + 8]


def test_a_device_shares_scales_among_32_to_128_numbers():
    assert [int4.group_on_device(group) for group in (32, 64, 128, 256, 4096)] == [32, 64, 128, 128, 128]
    assert [int4.group_on_device(group) for group in (16, 96, 4100)] == [0, 0, 0]


def check(T: int, sizes: tuple[int, ...], cut: Cut, dtype: Any, **options: Any) -> None:
    weight, worth = made(*sizes, dtype)
    N, K = worth.shape
    x_TK = jnp.asarray(np.random.default_rng(2).normal(size=(T, K)) / np.sqrt(K), dtype)
    got = np.asarray(int4_product.by_hopper(x_TK, weight, cut, out_dtype=dtype, **options), np.float32)
    want = np.asarray(x_TK, np.float32) @ worth.T
    assert got.shape == (T, N)
    np.testing.assert_allclose(got, want, rtol=2**-8, atol=2e-3 * np.abs(want).max())


CUTS = (
    (3, (64, 256, 128), Cut(Tile(8, 1, 128, 2), 1), "bfloat16"),
    (20, (192, 512, 64), Cut(Tile(24, 2, 128, 2), 2), "bfloat16"),  # a tile that two compute; two parts
    (70, (128, 256, 32), Cut(Tile(40, 1, 256, 2), 1), "float16"),  # two blocks
    (70, (128, 512, 128), Cut(Tile(72, 2, 128, 2), 1), "bfloat16"),  # widened ahead, the ring going round
)


@pytest.mark.parametrize("T, sizes, cut, dtype", CUTS, ids=str)
def test_rows_meet_codes(T, sizes, cut, dtype):
    check(T, sizes, cut, dtype, interpret=plgpu.InterpretGPUParams())


def swish(gate, up):
    return gate * jax.nn.sigmoid(gate) * up


@pytest.mark.parametrize("by_kernel", [True, False])
def test_gate_and_up_are_joined(by_kernel):
    rng, (F, K) = np.random.default_rng(0), (64, 256)
    codes = [rng.integers(0, 16, (F, K)).astype(np.uint8) for _ in range(2)]
    scales = [rng.uniform(0.5, 2, (F, K // 128)).astype(np.float32) for _ in range(2)]
    zeros = np.full((2 * F, K // 128), 7)
    packed = int4.pack(four_bits.join(*codes)), int4.pack_scales(four_bits.join(*scales), jnp.float16)
    weight = Weight(*map(jnp.asarray, (*packed, int4.pack_zeros(zeros, jnp.float16))))
    x_TK = jnp.asarray(rng.normal(size=(5, K)) / K, jnp.float16)
    wide = [
        (c.astype(np.float32) - 7) * np.repeat(s.astype(np.float16), 128, axis=1)
        for c, s in zip(codes, scales)
    ]
    want = swish(*(np.asarray(x_TK, np.float32) @ matrix.T for matrix in wide))
    if by_kernel:
        options = dict(out_dtype="float16", interpret=plgpu.InterpretGPUParams())
        got = int4_product.by_hopper(x_TK, weight, Cut(Tile(8, 2, 128, 2), 1), swish, **options)
    else:
        got = int4_product.project(x_TK, weight, "float16", swish)
    assert got.shape == (5, F)
    np.testing.assert_allclose(got, want, atol=4e-3 * np.abs(want).max())


SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (1024, 640))
"""[N, K] of Llama-3.1-8B's products, and of a small one."""


@pytest.mark.parametrize("N, K", SHAPES)
def test_what_is_cut_fits_and_divides(N, K):
    for T in (1, 8, 32, 48, 49, 64, 100, 128, 256, 1000, 2048):
        tile, parts = int4_product.choose_cut(T, K, N // 64)
        assert K % (tile.depth * parts) == 0 and tile.stages >= 2
        assert tile.block_rows % 8 == 0 and tile.block_rows <= 192
        num_bytes = tile.depth * (2 * tile.block_rows + 36 * tile.groups) * tile.stages
        of_results = tile.groups * 64 * tile.block_rows * (4 if parts > 1 else 2)
        assert num_bytes + of_results < 227 * 1024


@pytest.mark.parametrize("T", [1, 64, 256, 2048])
def test_kernels_lower_to_cuda_without_a_gpu(T, monkeypatch):
    monkeypatch.setattr(int4_product, "is_supported", lambda: True)
    monkeypatch.setattr("jaxserve.ops.backend.chosen", lambda: "fast")
    N, K = SHAPES[3]
    arrays = ((N // 64, K // 2, 64), "uint8"), ((N // 64, K // 128, 64), "bfloat16")
    weight = Weight(*(jax.ShapeDtypeStruct(*arrays[i]) for i in (0, 1, 1)))
    x_TK = jax.ShapeDtypeStruct((T, K), "bfloat16")
    with jax.sharding.use_abstract_mesh(H100):
        project = jax.jit(partial(int4_product.project, out_dtype="bfloat16"))
        lowered = project.trace(x_TK, weight).lower(lowering_platforms=("cuda",)).as_text()
    assert "int4_product" in lowered


def test_what_no_kernel_computes_is_widened_first():
    weight, worth = made(64, 128, 32)
    x_TK = np.random.default_rng(2).normal(size=(5, 128)).astype(np.float32)
    got = int4_product.project(jnp.asarray(x_TK), weight, "float32")
    np.testing.assert_allclose(got, x_TK @ worth.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("axes", [((), ()), (("ep", "tp"), ()), ((), ("tp",))], ids=str)
def test_devices_multiply_what_they_have(axes):
    weight, worth = made(256, 512, 128)
    devices = np.array(jax.devices()[:4]).reshape(2, 1, 2)
    mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)
    x_TK = np.random.default_rng(2).normal(size=(4, 512)).astype(np.float32)
    got = int4_product.over_mesh(mesh, *axes, "float32")(jnp.asarray(x_TK), weight)
    np.testing.assert_allclose(got, x_TK @ worth.T, rtol=1e-5, atol=2e-4)
