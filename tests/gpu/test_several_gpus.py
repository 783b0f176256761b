"""Layouts on several GPUs give one GPU's answers: greedy tokens and their logprobs, over real links."""

import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import jaxserve
from jaxserve.layers.channel_quant import ChannelQuant, quantise_model
from jaxserve.layers.mlp import Gated, GatedMLP
from jaxserve.layers.quant import BlockFP8, BlockScaled
from jaxserve.mesh import GROUP, Layout, make_mesh
from jaxserve.ops import backend
from tests.engine.asking import check_greedy
from tests.models.tiny import GOLDEN, Golden

pytestmark = pytest.mark.gpu

BACKENDS = ("allgather", "all_to_all", "ragged")
DENSE, SPARSE, HYBRID = "llama", ("qwen3_moe", "deepseek_v3", "gpt_oss"), "minimax_text"
# Summing over devices rounds otherwise than one device does, in float32; seen: under 2e-4.
LOGPROB_ATOL = 1e-3


def dpa(count):
    return {"tp": count, "dp_size": count, "enable_dp_attention": True}


def cells(count):
    """(family, layout) on `count` devices."""
    for family in (DENSE, *SPARSE, HYBRID):
        yield family, {"tp": count}
    for family in (DENSE, SPARSE[0]):  # XLA makes all collectives
        yield family, {"tp": count, "disable_custom_all_reduce": True}
    for family in (DENSE, *SPARSE):
        yield family, dpa(count)
    for family in SPARSE:
        for exchange in BACKENDS:
            yield family, {"tp": count, "ep": count, "moe_a2a_backend": exchange}
            yield family, dpa(count) | {"ep": count, "moe_a2a_backend": exchange}


def answers(family, rounds=1, **layout):
    """Replies to the recorded prompts, asked `rounds` times: first without a cache, then with."""
    prompts = [prompt.tolist() for prompt in Golden.read(family).prompts]
    params = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
    with jaxserve.Engine(
        model_path=str(GOLDEN / family), dtype="float32", device="cuda", skip_tokenizer_init=True,
        max_total_tokens=4096, max_running_requests=8, chunked_prefill_size=64, **layout,
    ) as engine:  # fmt: skip
        replies = [
            engine.generate(input_ids=prompts, sampling_params=params, return_logprob=True)
            for _ in range(rounds)
        ]
        assert engine.stats()["compiles_after_ready"] == 0
        by_xla = layout.get("tp", 1) == 1 or layout.get("disable_custom_all_reduce", False)
        assert by_xla or engine._engine.runner._links, "GPUs of one host exchange small arrays themselves"
    return replies


@functools.cache
def of_one_gpu(family):
    [replies] = answers(family)
    return replies


@pytest.mark.parametrize(
    "family, layout",
    [
        pytest.param(family, layout, id="-".join([family, *(f"{k}={v}" for k, v in layout.items())]))
        for count in (2, 4, 8)
        for family, layout in cells(count)
    ],
)
def test_answers_are_those_of_one_gpu(family, layout):
    if len(jax.devices()) < layout["tp"]:  # this also starts the backend with every GPU, not an engine's
        pytest.skip(f"needs {layout['tp']} GPUs")
    one = of_one_gpu(family)
    for replies in answers(family, rounds=2, **layout):
        check_greedy(Golden.read(family), replies)
        for reply, alone in zip(replies, one, strict=True):
            same = reply["output_ids"] == alone["output_ids"]
            if same:  # otherwise two choices were too close to call, which check_greedy judges
                got, want = (r["meta_info"]["output_token_logprobs"] for r in (reply, alone))
                values = [[entry[0] for entry in entries] for entries in (got, want)]
                np.testing.assert_allclose(*values, rtol=0, atol=LOGPROB_ATOL)


@pytest.mark.parametrize("in_float8", [False, True], ids=["bfloat16", "float8"])
def test_gate_and_up_that_two_gpus_share_go_through_the_kernel(in_float8):
    if len(jax.devices()) < 2:
        pytest.skip("needs 2 GPUs")
    mesh = make_mesh(Layout(2), jax.devices()[:2])
    step: Any = SimpleNamespace(mesh=mesh, num_ranks=1, links=None, once=lambda key, make: jax.jit(make()))
    mlp = GatedMLP("m", 1024, 28672, activation="silu", dtype=jnp.bfloat16)
    if in_float8:
        quantise_model(mlp, ChannelQuant("fp8"))
    rng = np.random.default_rng(0)
    for _, param in nnx.to_flat_state(nnx.state(mlp.gate_up, nnx.Param)):
        value = jnp.asarray(rng.uniform(-1, 1, param.get_value().shape) / 16, param.get_value().dtype)
        param.set_raw_value(jax.device_put(value, NamedSharding(mesh, PartitionSpec(GROUP))))
    mlp.gate_up.fuse(mesh)
    x = jax.device_put(
        jnp.asarray(rng.normal(size=(128, 1024)), jnp.bfloat16), NamedSharding(mesh, PartitionSpec())
    )

    def run(where):
        with backend.use(where):
            lowered = jax.jit(lambda x: Gated(x, mlp.gate_up, "silu", step).wide).lower(x)
        return lowered.as_text(), np.asarray(lowered.compile()(x), np.float32)

    (text, got), (_, want) = run("fast"), run("reference")
    assert "hopper_gated_product" in text
    np.testing.assert_allclose(got, want, rtol=2**-5, atol=2**-6 * np.abs(want).max())


@pytest.mark.parametrize("rows, kernel", [(8, "by_block"), (64, "hopper_block_product")])
@pytest.mark.parametrize("spec", [(GROUP,), (None, GROUP)], ids=["outputs", "inputs"])
def test_each_of_two_gpus_multiplies_its_blocks(spec, rows, kernel):
    if len(jax.devices()) < 2:
        pytest.skip("needs 2 GPUs")
    sharding = NamedSharding(make_mesh(Layout(2), jax.devices()[:2]), PartitionSpec(*spec))
    rng = np.random.default_rng(0)
    numbers = jnp.asarray(rng.normal(size=(2048, 1024)), jnp.float8_e4m3fn)
    scale = jnp.asarray(rng.uniform(0.5, 2, (16, 8)) / 32, jnp.float32)
    weight = BlockScaled(nnx.Param(jax.device_put(numbers, sharding)), nnx.Param(scale), BlockFP8())
    x = jnp.asarray(rng.normal(size=(rows, 1024)), jnp.bfloat16)
    want = np.asarray(x, np.float32) @ np.asarray(weight.matrix(1024, jnp.float32)).T
    weight.place(sharding)
    x = jax.device_put(x, NamedSharding(sharding.mesh, PartitionSpec()))
    with backend.use("fast"):
        lowered = jax.jit(lambda x: weight.product(x, jnp.bfloat16)).lower(x)
    assert ("hopper_block_product" in lowered.as_text()) == (kernel == "hopper_block_product")
    error = np.asarray(lowered.compile()(x), np.float32) - want
    assert np.sqrt(np.mean(error**2)) < 0.05 * want.std()
