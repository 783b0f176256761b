"""The grouped products for Hopper GPUs, interpreted on a CPU and lowered for one; tests/gpu runs them."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxserve.layers.moe import silu_gated
from jaxserve.ops import backend, grouped_gemm
from jaxserve.ops.grouped_gemm import ExpertWeights, hopper, rows_fast
from jaxserve.ops.grouped_gemm.hopper import Tile
from jaxserve.ops.grouped_gemm.hopper_packed import Tile as Packed
from tests.ops.cases import H100, in_float8
from tests.ops.test_grouped_gemm import Case, clamped

CASES = (
    Case(T=70, X=2, E=3, D=256, F=128, dtype="bfloat16"),
    Case(T=9, X=2, E=5, D=128, F=192, dtype="float16", activation=clamped, padding=0.0),
    Case(T=10, X=2, E=40, D=64, F=64, dtype="bfloat16"),
    Case(T=12, X=2, E=3, D=64, F=64, dtype="bfloat16", padding=1.1),
)


@dataclass(frozen=True)
class Float8Case(Case):
    """Weights in float8 with scales for blocks of 128 x 128, or channels; activations meet them in float8."""

    dtype: str = "bfloat16"
    block: int | None = 128

    def arguments(self):
        hidden, expert, weight, weights = super().arguments()
        if self.block:
            return hidden, expert, weight, weights
        rng = np.random.default_rng(self.seed)
        for name in ("gate_EFD", "up_EFD", "down_EDF"):
            matrix = getattr(weights, name)
            scale = jnp.asarray(rng.uniform(0.5, 2, (*matrix.shape[:2], 1)), jnp.float32)
            short = {name: matrix.astype(jnp.float8_e4m3fn), name.split("_")[0] + "_scale": scale}
            weights = weights._replace(**short)
        return hidden, expert, weight, weights

    def short(self, x) -> np.ndarray:
        return in_float8(x, self.block or x.shape[-1])

    def expected(self) -> np.ndarray:
        hidden, expert, weight, weights = self.arguments()
        gate, up, down = (self.dense(weights, name)[0] for name in ("gate", "up", "down"))
        x = self.short(hidden)
        gate, up = (np.einsum("td,efd->tef", x, matrix).astype(np.float32) for matrix in (gate, up))
        inner = jnp.asarray(self.activation(jnp.asarray(gate), jnp.asarray(up)), self.dtype)
        out = np.einsum("tef,edf->ted", self.short(inner), down)
        named = np.asarray(expert)[..., None]
        picked = np.take_along_axis(out, np.maximum(named, 0), axis=1) * np.asarray(weight)[..., None]
        return np.where(named >= 0, picked, 0).sum(axis=1)

    def dense(self, weights, name):
        matrix, bias = super().dense(weights, name)
        return (matrix if self.block else matrix * np.asarray(getattr(weights, f"{name}_scale"))), bias

    def check(self, **options) -> None:
        """A number halfway between two of float8, 2**-4 apart, goes either way: so the mean error counts."""
        error = run(self, **options) - self.expected()
        assert np.sqrt(np.mean(error**2)) < 0.02 * np.sqrt(np.mean(self.expected() ** 2)) + 1e-9


FLOAT8_CASES = (
    Float8Case(T=70, X=2, E=3, D=256, F=128),
    Float8Case(T=3, X=2, E=30, D=384, F=256, activation=clamped, padding=0.1),  # a block for each pair
    Float8Case(T=12, X=2, E=40, D=128, F=128, dtype="float16"),
    Float8Case(T=70, X=2, E=3, D=320, F=192, block=None),
    Float8Case(T=16, X=1, E=20, D=128, F=64, block=None, padding=0.0),
    Float8Case(T=5, X=2, E=4, D=256, F=128, block=None, padding=1.1),
)
PACKED_CASES = (
    Case(T=3, X=2, E=4, D=64, F=64, biases=True, activation=clamped, dtype="bfloat16", is_mxfp4=True),
    Case(T=12, X=1, E=20, D=64, F=64, dtype="bfloat16", is_mxfp4=True, padding=0.0),  # more than a block has
    Case(
        T=20, X=2, E=4, D=192, F=96, biases=True, dtype="bfloat16", is_mxfp4=True
    ),  # a tile that two compute
    Case(T=20, X=2, E=4, D=160, F=64, biases=True, dtype="bfloat16", is_mxfp4=True),  # half of a last tile
    Case(T=20, X=2, E=4, D=192, F=160, dtype="bfloat16", is_mxfp4=True),  # five groups, which go by two
    Case(T=90, X=1, E=1, D=128, F=192, dtype="bfloat16", is_mxfp4=True),  # widened ahead
    Case(T=70, X=2, E=3, D=64, F=64, biases=True, dtype="bfloat16", is_mxfp4=True, padding=1.1),
    Case(T=20, X=2, E=4, D=256, F=128, dtype="bfloat16", int4_group=128),
    Case(T=90, X=1, E=2, D=128, F=192, dtype="bfloat16", int4_group=32),  # widened ahead
)
PACKED_RINGS = (Packed(16, 2, 64, 2), Packed(64, 2, 128, 2))
PACKED_RING_CASE = Case(T=20, X=1, E=2, D=384, F=384, biases=True, dtype="bfloat16", is_mxfp4=True)
TILES = ((Tile(1, 64, 64, 3), Tile(1, 64, 64, 2)), (Tile(2, 64, 64, 2), Tile(2, 64, 64, 3)))


def run(case, tiles=None, **options):
    """`tiles`: those that are chosen for the case unless given."""
    tiles = tiles or hopper.choose_tiles(case.T * case.X / case.E, jax.eval_shape(case.arguments)[3])
    function = functools.partial(hopper.feed_forward, activation=case.activation, tiles=tiles, **options)
    return np.asarray(jax.jit(function)(*case.arguments()))


def check(case, **options):
    got = run(case, **options)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, case.expected(), rtol=0, atol=case.tolerance())


@pytest.mark.parametrize("case", FLOAT8_CASES, ids=str)
def test_float8_rows_meet_float8_weights(case):
    case.check(interpret=plgpu.InterpretGPUParams())


@pytest.mark.parametrize("case", PACKED_CASES, ids=str)
def test_numbers_of_four_bits_are_widened_on_the_way(case):
    hidden, _, _, weights = case.arguments()
    assert hopper.fits(hidden, weights, case.T * case.X / case.E)
    check(case, interpret=plgpu.InterpretGPUParams())


@pytest.mark.parametrize("tile", PACKED_RINGS, ids=str)
def test_a_ring_of_packed_tiles_goes_round(tile):
    check(PACKED_RING_CASE, tiles=(tile, tile), interpret=plgpu.InterpretGPUParams())


def test_exponents_that_no_copy_can_bring_are_left_to_another_path():
    hidden, _, _, weights = Case(D=96, F=32, dtype="bfloat16", is_mxfp4=True).arguments()
    assert not hopper.fits(hidden, weights, 1)


@pytest.mark.parametrize("block", [128, None])
def test_float8_rows_fill_several_warpgroups(block):
    tile = Tile(2, 64, 128 if block else 64, 2)
    case = Float8Case(T=140, X=1, E=2, D=128, F=128, block=block)
    case.check(tiles=(tile, tile), interpret=plgpu.InterpretGPUParams())


@pytest.mark.parametrize("tiles", (None, *TILES), ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_token_gets_the_weighted_sum_of_the_experts_it_names(case, tiles):
    check(case, tiles=tiles, interpret=plgpu.InterpretGPUParams())


def test_many_tokens_go_in_parts():
    case = replace(CASES[2], T=24)
    one_token = case.X * (2 * case.D + case.F) * 2
    check(case, interpret=plgpu.InterpretGPUParams(), workspace_bytes=12 * one_token)


def test_nothing_that_padding_carries_reaches_a_result():
    case = replace(CASES[1], padding=0.0)
    hidden, expert, weight, weights = case.arguments()
    function = functools.partial(
        hopper.feed_forward,
        weights=weights,
        activation=clamped,
        tiles=TILES[0],
        interpret=plgpu.InterpretGPUParams(),
    )
    want = function(hidden, expert, weight)[:4]
    got = function(hidden.at[4:].set(jnp.nan), expert.at[4:].set(-1), weight.at[4:].set(jnp.nan))
    np.testing.assert_allclose(got[:4], want, atol=1e-6)
    assert not np.asarray(got[4:]).any()


@pytest.mark.parametrize(
    "M, E, block_rows, padding",
    [(1, 4, 16, 0.0), (40, 5, 16, 0.3), (3000, 7, 64, 0.1), (64, 4, 16, 1.0), (2048, 60, 16, 0.0)],
)
def test_experts_rows_begin_with_a_block_of_their_own(M, E, block_rows, padding):
    rng = np.random.default_rng(M)
    expert = np.where(rng.random(M) < padding, -1, rng.integers(0, E, M) ** 2 % E).astype(np.int32)
    place = functools.partial(rows_fast.place, num_experts=E, block_rows=block_rows, interpret=True)
    places = place(jnp.asarray(expert[:, None]))
    counted = np.asarray(places.end_B - places.start_B)
    owner, row = np.asarray(places.expert_B), np.asarray(places.row_M)
    assert counted.sum() == (expert >= 0).sum()
    begin = np.arange(len(owner)) * block_rows
    assert (np.asarray(places.start_B)[counted > 0] == begin[counted > 0]).all()
    taken = {b * block_rows + i: owner[b] for b in range(len(owner)) for i in range(counted[b])}
    found = {int(row[m]): expert[m] for m in range(M) if expert[m] >= 0}
    assert found == taken, "each pair has a row of its own, in a block of its expert"
    assert max(taken, default=0) < places.num_rows


@pytest.mark.parametrize("T", [4, 256, 2048], ids=["few_tokens", "few_rows", "many_rows"])
@pytest.mark.parametrize("kind", ["bfloat16", "a_scale_a_channel", "a_scale_a_block"])
def test_kernels_lower_to_cuda_without_a_gpu(T, kind):
    sizes: Any = dict(T=T, X=6, E=64, D=2048, F=1408, dtype="bfloat16")
    is_wide = kind == "bfloat16"
    case = Case(**sizes) if is_wide else Float8Case(**sizes, block=128 if kind == "a_scale_a_block" else None)
    arguments = arguments_of(case) if is_wide else case.shapes()
    tiles = hopper.choose_tiles(T * 6 / 64, arguments[3])
    function = functools.partial(hopper.feed_forward, activation=silu_gated, tiles=tiles)
    with jax.sharding.use_abstract_mesh(H100):
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "hopper_experts_up" in lowered and "hopper_experts_down" in lowered


@pytest.mark.parametrize("F", [2880, 1440], ids=["alone", "tp 2"])
@pytest.mark.parametrize("T", [1, 32, 256, 2048])
def test_packed_kernels_lower_to_cuda_without_a_gpu(T, F):
    """Of GPT-OSS's sizes: what a warpgroup does in its registers is not interpreted."""
    case = Case(T=T, X=4, E=32, D=2880, F=F, dtype="bfloat16", biases=True, is_mxfp4=True)
    arguments = case.shapes()
    tiles = hopper.choose_tiles(T * 4 / 32, arguments[3])
    assert hopper.fits(arguments[0], arguments[3], T * 4 / 32)
    assert all(tile.stages == 3 and tile.depth >= 160 for tile in tiles)
    function = functools.partial(hopper.feed_forward, activation=clamped, tiles=tiles)
    with jax.sharding.use_abstract_mesh(H100):
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "packed_experts_up" in lowered and "packed_experts_down" in lowered


def arguments_of(case):
    """Abstract ones: shapes as models have them are large."""

    def array(*shape, dtype=case.dtype) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    E, D, F = case.E, case.D, case.F
    weights = ExpertWeights(array(E, F, D), array(E, F, D), array(E, D, F))
    ids, weight = array(case.T, case.X, dtype="int32"), array(case.T, case.X, dtype="float32")
    return array(case.T, D), ids, weight, weights


@pytest.mark.parametrize("F", [1408, 768, 704, 320])
def test_tiles_divide_what_they_cut(F):
    for rows_per_expert in (12, 64):
        weights = arguments_of(Case(D=2048, F=F))[3]
        up, down = hopper.choose_tiles(rows_per_expert, weights)
        assert F % up.columns == 0 and 2048 % up.depth == 0
        assert 2048 % down.columns == 0 and F % down.depth == 0
        assert up.groups == down.groups, "their blocks are the same"


def test_what_it_does_not_compute_or_not_faster_stays_with_the_other_kernels():
    case = Case(T=64, X=6, E=32, D=128, F=128, dtype="bfloat16")

    def fits(rows_per_expert=12.0, **changes):
        weights = changes.pop("weights", {})
        hidden, _, _, all_weights = arguments_of(replace(case, **changes))
        return hopper.fits(hidden, all_weights._replace(**weights), rows_per_expert)

    assert fits() and fits(dtype="float16") and fits(F=320)
    assert not fits(11.9)
    assert not fits(dtype="float32")
    assert not fits(F=96)
    assert not fits(D=96)
    short = jax.ShapeDtypeStruct((32, 128, 128), jnp.float8_e4m3fn)
    bias = {"gate_bias_EF": jax.ShapeDtypeStruct((32, 128), jnp.bfloat16)}
    assert not fits(weights={"gate_EFD": short})
    assert not fits(weights=bias)

    def scaled(*scales, matrix=short):
        return {"gate_EFD": matrix, "gate_scale": jax.ShapeDtypeStruct((32, *scales), jnp.float32)}

    for scales in ((128, 1), (1, 1)):
        assert fits(1.0, weights=scaled(*scales)), "a channel's, a block's: any number of rows"
        assert not fits(weights=scaled(*scales) | bias)
        assert not fits(weights=scaled(*scales), dtype="float32")
        assert not fits(weights=scaled(*scales, matrix=jax.ShapeDtypeStruct((32, 128, 128), jnp.int8)))
    assert not fits(weights=scaled(2, 2)), "blocks of another size"


@pytest.mark.parametrize(
    "is_supported, rows_per_expert, expected",
    [(True, None, "hopper"), (True, 4.0, "fast"), (False, None, "fast")],
)
def test_a_gpu_that_can_gets_the_kernels_for_hopper(monkeypatch, is_supported, rows_per_expert, expected):
    """Unless most of the ids are of experts elsewhere, and a few rows are left for each that is here."""
    asked = []
    for where in ("hopper", "fast"):
        module = getattr(grouped_gemm, where)
        monkeypatch.setattr(module, "feed_forward", lambda *_, where=where, **__: asked.append(where))
    monkeypatch.setattr(grouped_gemm, "is_supported", lambda: is_supported)
    case = Case(T=64, X=6, E=32, D=128, F=128, dtype="bfloat16")
    with backend.use("fast"):
        grouped_gemm.feed_forward(*arguments_of(case), silu_gated, rows_per_expert)
    assert asked == [expected]
