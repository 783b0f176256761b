"""Experts: the reference against every expert computed densely, the kernels against the same."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.ops import backend, four_bits, grouped_gemm, int4, mxfp4
from jaxserve.ops.grouped_gemm import ExpertWeights, rows_fast
from jaxserve.ops.grouped_gemm.fast import Tile
from jaxserve.ops.grouped_gemm.rows import group
from tests.ops.cases import H100


def silu(gate, up):
    return jax.nn.silu(gate) * up


def clamped(gate, up):
    return jnp.minimum(gate, 1.0) * (jnp.clip(up, -1.0, 1.0) + 1)


@dataclass(frozen=True)
class Case:
    T: int = 7
    X: int = 2
    E: int = 4
    D: int = 32
    F: int = 16
    dtype: str = "float32"
    biases: bool = False
    block: int | None = None  # of float8 weights
    is_mxfp4: bool = False
    int4_group: int | None = None  # of integers of four bits
    padding: float = 0.3  # share of ids that are -1
    activation: Any = silu
    seed: int = 0

    def __str__(self) -> str:
        """Without the function's address: a test has the same name in every process."""
        return repr(replace(self, activation=self.activation.__name__))

    @property
    def is_packed(self) -> bool:
        return self.is_mxfp4 or self.int4_group is not None

    def arguments(self):
        rng = np.random.default_rng(self.seed)

        def normal(*shape, scale=1.0):
            return jnp.asarray(rng.normal(size=shape) * scale, self.dtype)

        expert = np.stack([rng.permutation(self.E)[: self.X] for _ in range(self.T)]).astype(np.int32)
        expert[rng.random(expert.shape) < self.padding] = -1
        E, D, F = self.E, self.D, self.F
        weights = ExpertWeights(
            normal(E, F, D, scale=D**-0.5), normal(E, F, D, scale=D**-0.5), normal(E, D, F, scale=F**-0.5)
        )
        if self.biases:
            weights = weights._replace(
                gate_bias_EF=normal(E, F), up_bias_EF=normal(E, F), down_bias_ED=normal(E, D)
            )
        if self.block:
            for name in ("gate", "up", "down"):
                field = f"{name}_EDF" if name == "down" else f"{name}_EFD"
                matrix = getattr(weights, field)
                scale = rng.uniform(0.5, 2, [n // self.block if i else n for i, n in enumerate(matrix.shape)])
                weights = weights._replace(
                    **{
                        field: matrix.astype(jnp.float8_e4m3fn),
                        f"{name}_scale": jnp.asarray(scale, jnp.float32),
                    }
                )
        for name, rows, size in (("gate_EFD", 2 * F, D), ("down_EDF", D, F)):
            if not self.is_packed:
                break
            part, tiles = name.split("_")[0], four_bits.num_tiles(rows)
            packed = rng.integers(0, 256, (E, tiles, size // 2, four_bits.LINE))
            shape = E, tiles, size // (self.int4_group or mxfp4.GROUP), four_bits.LINE
            changed = {name: jnp.asarray(packed, jnp.uint8), "up_EFD": None}
            # Of size K^-0.5, as above: all numbers alike, their squares are 2.9**2 or 4.6**2 on average.
            if self.is_mxfp4:
                one = int(mxfp4.stored_exponent(127)) + round(np.log2(size**-0.5 / 2.9))
                changed[f"{part}_scale"] = jnp.asarray(rng.integers(one - 1, one + 1, shape), jnp.uint8)
            else:
                scale = rng.uniform(0.7, 1.4, shape) * size**-0.5 / 4.6
                changed[f"{part}_scale"] = jnp.asarray(scale, jnp.bfloat16)
                changed[f"{part}_zero"] = jnp.asarray(
                    int4.offset(jnp.bfloat16).value + rng.integers(7, 10, shape), jnp.bfloat16
                )
            weights = weights._replace(**changed)
        weight = jnp.asarray(rng.uniform(0.1, 1, expert.shape), jnp.float32)
        return normal(self.T, D), jnp.asarray(expert), weight, weights

    def shapes(self):
        """Of the arguments; drawing those of 256 experts would take half a minute."""
        *inputs, weights = jax.eval_shape(replace(self, E=self.X).arguments)
        of_all = lambda few: jax.ShapeDtypeStruct((self.E, *few.shape[1:]), few.dtype)  # noqa: E731
        return *inputs, jax.tree.map(of_all, weights)

    def expected(self) -> np.ndarray:
        """Every expert on every token in float64, then those that the token names."""
        hidden, expert, weight, weights = self.arguments()
        wide = {name: self.dense(weights, name) for name in ("gate", "up", "down")}
        x = np.asarray(hidden, np.float64)
        gate, up = (np.einsum("td,efd->tef", x, wide[n][0]) + wide[n][1] for n in ("gate", "up"))
        inner = np.asarray(self.activation(jnp.asarray(gate), jnp.asarray(up)), np.float64)
        out = np.einsum("tef,edf->ted", inner, wide["down"][0]) + wide["down"][1]
        picked = np.zeros(x.shape)
        for t, x_ in np.argwhere(np.asarray(expert) >= 0):
            picked[t] += out[t, expert[t, x_]] * float(weight[t, x_])
        return picked

    def dense(self, weights, name):
        if self.is_packed:
            weights = grouped_gemm.reference.widened(weights, jnp.bfloat16)
        matrix = getattr(weights, f"{name}_EDF" if name == "down" else f"{name}_EFD")
        matrix = np.asarray(matrix, np.float64)
        if self.block:
            scale = np.asarray(getattr(weights, f"{name}_scale"))
            matrix = matrix * scale.repeat(self.block, 1).repeat(self.block, 2)
        bias = getattr(weights, f"{name}_bias_ED" if name == "down" else f"{name}_bias_EF")
        return matrix, 0 if bias is None else np.asarray(bias, np.float64)

    def tolerance(self) -> float:
        """float32: summation order. bfloat16: rounding (2**-8) of inner values and outputs of size 1..4."""
        return 1e-5 if self.dtype == "float32" else 5e-2


TILE = Tile(16, 64, 32, warps=4, stages=2)


def run(case, where="reference", **options):
    function = grouped_gemm.feed_forward
    if options:
        function = functools.partial(grouped_gemm.fast.feed_forward, **{"tile": TILE, **options})
    function = functools.partial(function, activation=case.activation)
    with backend.use(where):
        return np.asarray(jax.jit(function)(*case.arguments()))


def check(case, where="reference", **options):
    got = run(case, where, **options)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, case.expected(), rtol=0, atol=case.tolerance())


cases = st.builds(
    Case,
    T=st.integers(1, 40),
    X=st.integers(1, 4),
    E=st.sampled_from([4, 5, 16]),
    padding=st.sampled_from([0.0, 0.5, 1.0]),
    biases=st.booleans(),
    activation=st.sampled_from([silu, clamped]),
    seed=st.integers(0, 99),
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(case=cases)
def test_each_token_gets_the_weighted_sum_of_the_experts_it_names(case):
    check(case)


KERNEL_CASES = (
    Case(),
    Case(T=40, X=3, E=5, biases=True, activation=clamped),
    Case(T=20, X=2, E=16, D=48, F=24),  # neither is a power of two
    Case(T=20, D=64, F=32, dtype="bfloat16"),
    Case(T=20, D=64, F=96, block=32),
    Case(T=9, D=64, F=32, dtype="bfloat16", block=16, biases=True),
    Case(T=300, X=2, E=2, D=32, F=32, dtype="bfloat16"),  # more than 64 rows an expert
    Case(T=20, D=128, F=32, is_mxfp4=True, biases=True, activation=clamped),
    Case(T=90, X=2, E=3, D=192, F=224, dtype="bfloat16", is_mxfp4=True),
)
FEW_TOKENS = (
    Case(T=1, X=8, E=16, D=64, F=32, dtype="bfloat16"),
    Case(T=16, X=1, E=16, D=48, F=24, biases=True),
    Case(T=4, X=1, E=5, biases=True, activation=clamped, seed=4),
    Case(T=5, X=3, E=20, D=64, F=96, block=32),
    Case(T=3, X=8, E=40, D=64, F=32, block=16, biases=True),
    Case(T=9, X=6, E=64, padding=0.0),
    Case(T=7, X=2, E=16, padding=1.1, biases=True),
    Case(T=3, X=4, E=32, D=64, F=64, dtype="bfloat16", is_mxfp4=True, biases=True),
)


@pytest.mark.parametrize("case", (*KERNEL_CASES, *FEW_TOKENS), ids=str)
def test_kernel_equals_the_dense_sum(case):
    check(case, "reference")
    check(case, "interpret")


def test_widening_experts_in_every_step_is_said_once(caplog):
    case = Case(D=64, F=32, is_mxfp4=True)
    grouped_gemm._warn_of_widening.cache_clear()
    for _ in range(2):
        with backend.use("fast"):
            jax.eval_shape(functools.partial(grouped_gemm.feed_forward, activation=silu), *case.arguments())
    assert caplog.text.count("--dequantize-weights widens them when they are loaded") == 1


def test_kernel_gives_the_same_for_any_tile():
    for tile in (Tile(16, 16, 16, 4, 2), Tile(32, 64, 32, 4, 2), Tile(64, 32, 64, 4, 2)):
        check(Case(T=30, D=48, F=40, biases=True), "interpret", interpret=True, tile=tile)


def test_few_tokens_that_name_one_expert_share_its_block():
    """Token 0 is padding, 1 and 3 name expert 2 in different places, 2 names another one between."""
    case = Case(T=4, X=2, E=8)
    hidden, _, weight, weights = case.arguments()
    expert = jnp.array([[-1, -1], [5, 2], [7, -1], [2, 0]], jnp.int32)
    want = grouped_gemm.reference.feed_forward(hidden, expert, weight, weights, silu)
    got = grouped_gemm.fast.feed_forward(hidden, expert, weight, weights, silu, TILE, interpret=True)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    rows = grouped_gemm.fast.Rows.of(expert, 8, 16, interpret=True)
    assert (rows.num_blocks, [array.shape for array in rows.arrays]) == (8, [(4, 2)])


@pytest.mark.parametrize("T, parts", [(24, 8), (20, 4), (7, 1)])
def test_many_tokens_go_in_parts_that_divide_them(T, parts):
    case = Case(T=T, X=2, D=32, F=16)
    check(case, "interpret", interpret=True, workspace_bytes=3 * 2 * (32 + 16) * 4)
    function = functools.partial(
        grouped_gemm.fast.feed_forward, activation=silu, tile=TILE, workspace_bytes=3 * 2 * (32 + 16) * 4
    )
    [call] = jax.make_jaxpr(function)(*case.arguments()).eqns
    equations = call.params["jaxpr"].eqns
    loops = [e.params["length"] for e in equations if e.primitive.name == "scan"]
    assert loops == ([parts] if parts > 1 else [])


def test_step_of_padding_alone_gives_zero():
    case = Case(padding=1.1)
    for where in ("reference", "interpret"):
        assert (run(case, where) == 0).all()


def test_padding_has_no_block_of_rows():
    """Two tokens of expert 1, one of expert 3, the rest padding: two blocks, whatever the shape."""
    expert = np.full((64, 1), -1, np.int32)
    expert[[5, 9], 0], expert[60, 0] = 1, 3
    blocks = group(jnp.asarray(expert), 4, 16)
    assert int(blocks.count) == 2
    assert [int(x) for x in blocks.expert_B[:2]] == [1, 3]
    assert [(int(s), int(e)) for s, e in zip(blocks.start_B, blocks.end_B)][:3] == [(0, 2), (2, 3), (0, 0)]
    assert [int(x) for x in blocks.order_M[:3]] == [5, 9, 60]


def check_same_groups(got, want, num_rows):
    """The same rows, and the same blocks but for empty ones, which may be anywhere."""
    np.testing.assert_array_equal(got.order_M[:num_rows], want.order_M[:num_rows])
    assert int(got.count) == int(want.count)
    got, want = (np.stack([b.expert_B, b.start_B, b.end_B])[:, b.start_B < b.end_B] for b in (got, want))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    "M, E, block_rows, padding",
    [
        (1, 4, 16, 0.0),
        (40, 5, 16, 0.3),
        (3000, 7, 32, 0.1),
        (64, 4, 16, 1.0),
        (2048, 60, 16, 0.0),
        (64, 8, 1, 0.0),  # every row is a block
        (96, 3, 32, 0.0),
    ],
)
def test_kernel_groups_rows_as_the_reference_does(M, E, block_rows, padding):
    """More than one chunk of pairs, experts of no rows, no pair at all, E that is no power of two."""
    rng = np.random.default_rng(M)
    expert = np.where(rng.random((M, 1)) < padding, -1, rng.integers(0, E, (M, 1)) ** 2 % E)
    expert_TX = jnp.asarray(expert, jnp.int32)
    want = group(expert_TX, E, block_rows)
    got = jax.jit(functools.partial(rows_fast.group, num_experts=E, block_rows=block_rows, interpret=True))(
        expert_TX
    )
    check_same_groups(got, want, num_rows=int((expert >= 0).sum()))


def test_nothing_that_padding_carries_reaches_a_result():
    case = Case(T=6, padding=0.0)
    hidden, expert, weight, weights = case.arguments()
    want = run(case)[:4]
    hidden, weight = hidden.at[4:].set(jnp.nan), weight.at[4:].set(jnp.nan)
    expert = expert.at[4:].set(-1)
    for where in ("reference", "interpret"):
        with backend.use(where):
            got = jax.jit(functools.partial(grouped_gemm.feed_forward, activation=silu))(
                hidden, expert, weight, weights
            )
        np.testing.assert_allclose(got[:4], want, atol=1e-6)
        assert not np.asarray(got[4:]).any()


LOWERED = (
    *((case, 3) for case in (*KERNEL_CASES[3:], Case(T=32, X=8, E=128, D=2048, F=768, dtype="bfloat16"))),
    *((case, 2) for case in (*FEW_TOKENS, Case(T=16, X=8, E=256, D=2048, F=768, dtype="bfloat16"))),
)


@pytest.mark.parametrize("case, num_kernels", LOWERED, ids=str)
def test_kernel_lowers_to_cuda_without_a_gpu(case, num_kernels):
    """Rows are sorted by a kernel, few tokens are not."""
    function = functools.partial(grouped_gemm.feed_forward, activation=case.activation)
    with backend.use("fast"), jax.sharding.use_abstract_mesh(H100):
        text = jax.jit(function).trace(*case.shapes()).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("xla.gpu.triton") == num_kernels
