"""The devices' own collectives, with XLA's in the kernel's place: what is exchanged, and in which order.

The kernel itself wants GPUs (tests/gpu/test_several_gpus.py).
"""

import inspect
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxserve
from jaxserve.layers.channel_quant import ChannelScaled, quantise
from jaxserve.layers.embed import Vocabulary
from jaxserve.layers.linear import project
from jaxserve.layers.quant import BlockFP8, BlockScaled
from jaxserve.layers.split_product import project_split
from jaxserve.mesh import AXES, GROUP, Layout, make_mesh
from jaxserve.ops import backend, peer_exchange
from jaxserve.parallel import links as links_module
from jaxserve.parallel.links import RANKS, LinkArrays, LinkPlan, Links
from tests.engine.asking import check_greedy
from tests.models.tiny import GOLDEN, Golden

LAYOUTS = {"tp4": Layout(4), "dpa4": Layout(4, dp=4), "tp4-dpa2": Layout(4, dp=2), "ep4": Layout(4, ep=4)}


@pytest.fixture(params=LAYOUTS)
def mesh(request):
    return make_mesh(LAYOUTS[request.param], jax.devices())


@pytest.fixture(params=["tp4", "tp4-dpa2", "ep4"])
def split_mesh(request):
    """One with attention groups of several devices."""
    return make_mesh(LAYOUTS[request.param], jax.devices())


def plan_of(mesh):
    """What `LinkPlan.of` says of a mesh of GPUs that reach each other."""
    return LinkPlan(tuple(mesh.shape[axis] for axis in AXES))


def run(mesh, function, x):
    """`function(links, x)` on each device's part of `x`, and the arrays for who comes next."""
    arrays, mail = plan_of(mesh).make(mesh)
    links = Links(plan_of(mesh), arrays)

    def on_device(x, arrays, last):
        return function(links.inside(arrays, last), x)

    specs = (P(AXES), *Links.SPECS)
    shard_map = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=P(AXES), check_vma=False)
    out = jax.jit(lambda x, arrays, last: (shard_map(x, arrays, last), links.after()))(x, arrays, links.last)
    del mail
    return out


def eqns(jaxpr, name):
    """Those of a jaxpr and of what it calls whose name parameter, or primitive, is `name`, in order."""
    found = []
    for eqn in jaxpr.eqns:
        if name in (eqn.params.get("name"), eqn.primitive.name):
            found.append(eqn)
            continue
        inner = [getattr(value, "jaxpr", value) for value in eqn.params.values()]
        found += [e for value in inner if hasattr(value, "eqns") for e in eqns(value, name)]
    return found


def test_each_exchange_takes_what_the_one_before_made_for_xla_would_change_their_order():
    mesh = make_mesh(LAYOUTS["tp4-dpa2"], jax.devices())
    plan = plan_of(mesh)
    arrays, _ = plan.make(mesh)

    def on_device(x, ids, arrays, last):
        links = Links(plan, arrays, last)
        return links.gather(ids, RANKS), links.sum(x, GROUP), links.scatter_sum(x, RANKS)

    specs = (P(AXES), P(AXES), *Links.SPECS)
    function = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=P(AXES), check_vma=False)
    x, ids, last = jnp.ones((4 * 512, 4096), jnp.bfloat16), jnp.ones((32, 6), jnp.int32), jnp.zeros(2)
    with backend.use("fast"):
        jaxpr = jax.make_jaxpr(function)(x, ids, arrays, last)
    first, *others = found = eqns(jaxpr.jaxpr, "exchange")
    assert len(found) == 3, "a gather, a sum in parts, a scattered sum"
    after = inspect.signature(peer_exchange.exchange).parameters
    place = list(after).index("after")
    for before, exchange in zip(found, others):
        makers = {id(v): e for e in eqns_beside(jaxpr.jaxpr, first) for v in e.outvars}
        maker = makers[id(exchange.invars[place])]
        while maker.primitive.name in ("reshape", "broadcast_in_dim"):
            maker = makers[id(maker.invars[0])]
        assert maker is before


def eqns_beside(jaxpr, eqn):
    """All equations of the jaxpr in which `eqn` is."""
    if eqn in jaxpr.eqns:
        return jaxpr.eqns
    for outer in jaxpr.eqns:
        for value in outer.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns") and (found := eqns_beside(inner, eqn)):
                return found
    return []


def test_sums_of_products_take_what_the_one_before_made():
    mesh = make_mesh(LAYOUTS["tp4"], jax.devices())
    links = Links(plan_of(mesh), plan_of(mesh).make(mesh)[0])
    step = SimpleNamespace(
        links=links, mesh=mesh, num_ranks=1, once=lambda key, make: partial(jax.jit, inline=False)(make())
    )
    weight = nnx.Param(jnp.ones((1024, 64), jnp.bfloat16))

    def both(x, y):
        return project_split(x, weight, None, step), project_split(y, weight, None, step)

    x = jnp.ones((8, 64), jnp.bfloat16)
    with backend.use("fast"):
        jaxpr = jax.make_jaxpr(both)(x, 2 * x).jaxpr
    one, other = (eqn for eqn in jaxpr.eqns if eqn.primitive.name in ("pjit", "jit"))
    assert one.outvars[0] in other.invars


@pytest.mark.parametrize(
    "kind, dtype, far",
    [
        ("wide", jnp.float32, 1e-5),
        ("blocks", jnp.float32, 1e-5),  # cut by the mesh
        ("blocks that stay whole", jnp.float32, 1e-5),
        ("blocks that stay whole", jnp.bfloat16, 0.01),
        ("int8", jnp.float32, 1e-5),
        ("fp8", jnp.float32, 1e-5),
        ("fp8", jnp.bfloat16, 0.06),  # rows of float8 too, with a scale on each device
    ],
)
def test_sums_of_products_are_those_of_one_device(split_mesh, kind, dtype, far):
    mesh, T, D, H = split_mesh, 32, 256, 4
    K = 128 if kind == "blocks that stay whole" else 64
    x_THK = jax.random.normal(jax.random.key(0), (T, H, K), dtype)
    wide = jax.random.normal(jax.random.key(1), (D, H, K)) / 16
    match kind:
        case "wide":
            weight = nnx.Param(wide.astype(dtype))
        case "blocks" | "blocks that stay whole":
            scale = nnx.Param(jax.random.uniform(jax.random.key(2), (2, H * K // 128), minval=0.5))
            weight = BlockScaled(nnx.Param(wide.astype(jnp.float8_e4m3fn)), scale, BlockFP8())
            weight.place(NamedSharding(mesh, P(None, GROUP)))
            of_device = H * K // (mesh.shape["ep"] * mesh.shape["tp"])
            assert (weight.split(H * K) is None) == (of_device % 128 > 0)
        case _:
            weight = ChannelScaled(*map(nnx.Param, quantise(wide, kind, 1)))
    wanted = project(x_THK, weight)
    plan = plan_of(mesh)

    def split(x_THK, arrays):
        links, made = Links(plan, arrays), {}
        num_ranks = mesh.shape["dp"]
        step = SimpleNamespace(
            links=links, mesh=mesh, num_ranks=num_ranks, once=lambda key, make: made.setdefault(key, make())
        )
        return project_split(x_THK, weight, None, step), links.after()

    got, after = jax.jit(split)(x_THK, plan.make(mesh)[0])
    assert int(after.number[0]) == 2, "an exchange of the group"
    got, wanted = np.asarray(got, np.float32), np.asarray(wanted, np.float32)
    assert np.sqrt(np.mean((got - wanted) ** 2)) <= far * wanted.std()


@pytest.mark.parametrize("scheme, layout", [("fp8", {"tp": 2}), ("int8", {"tp": 4})])
def test_engines_with_weights_in_8_bits_give_one_devices_tokens(
    engine, compile_cache, monkeypatch, scheme, layout
):
    prompts = [prompt.tolist() for prompt in Golden.read("llama").prompts]

    def tokens(served):
        params = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
        return [reply["output_ids"] for reply in served.generate(input_ids=prompts, sampling_params=params)]

    wanted = tokens(engine("llama", quantization=scheme))
    monkeypatch.setattr(LinkPlan, "of", classmethod(lambda cls, mesh: plan_of(mesh)))
    with jaxserve.Engine(
        model_path=str(GOLDEN / "llama"), dtype="float32", device="cpu", skip_tokenizer_init=True,
        grammar_backend="none", compile_cache_dir=compile_cache, max_total_tokens=1024,
        max_running_requests=4, chunked_prefill_size=32, quantization=scheme, **layout,
    ) as served:  # fmt: skip
        assert tokens(served) == wanted
        assert int(served._engine.runner._links.number[0]) > 64, "sums of products too"


def test_rows_of_the_embedding_are_those_of_one_device(split_mesh):
    mesh = split_mesh
    vocabulary = Vocabulary("model.", 61, 32, tied=True, dtype=jnp.float32, scale=3.0)
    vocabulary.split(mesh)
    rows = vocabulary.embedding.get_value().shape[0]
    vocabulary.embedding.set_value(jax.random.normal(jax.random.key(0), (rows, 32)))
    token_T = jnp.arange(64) % 61
    plan = plan_of(mesh)

    def embed(token_T, arrays):
        links = Links(plan, arrays)
        step = SimpleNamespace(links=links, mesh=mesh, num_ranks=mesh.shape["dp"])
        return vocabulary.embed(token_T, step), links.after()

    got, after = jax.jit(embed)(token_T, plan.make(mesh)[0])
    assert int(after.number[0]) == 2
    np.testing.assert_array_equal(got, vocabulary.embed(token_T))


def test_groups_are_those_of_more_than_one_device():
    assert plan_of(make_mesh(LAYOUTS["tp4"], jax.devices())).groups == (GROUP,)
    assert plan_of(make_mesh(LAYOUTS["dpa4"], jax.devices())).groups == (RANKS,)
    assert plan_of(make_mesh(LAYOUTS["tp4-dpa2"], jax.devices())).groups == (GROUP, RANKS)


@pytest.mark.parametrize("name", ["sum", "gather", "scatter_sum"])
def test_collectives_are_those_of_lax(mesh, name):
    x = jax.random.normal(jax.random.key(0), (4 * 8, 1024))
    for axes in plan_of(mesh).groups:
        lax = {
            "sum": lambda x, axes=axes: jax.lax.psum(x, axes),
            "gather": lambda x, axes=axes: jax.lax.all_gather(x, axes, tiled=True),
            "scatter_sum": lambda x, axes=axes: jax.lax.psum_scatter(x, axes, tiled=True),
        }[name]
        wanted = jax.shard_map(lax, mesh=mesh, in_specs=P(AXES), out_specs=P(AXES), check_vma=False)(x)
        got, _ = run(mesh, lambda links, x, axes=axes: getattr(links, name)(x, axes), x)
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)


def test_large_sums_are_made_in_parts_and_larger_ones_not_at_all():
    mesh = make_mesh(LAYOUTS["tp4"], jax.devices())
    links = Links(plan_of(mesh), plan_of(mesh).make(mesh)[0])

    def count(rows):
        return links.count(jax.ShapeDtypeStruct((rows, 4096), jnp.bfloat16), GROUP)

    assert [count(rows) for rows in (1, 32, 64, 128, 512, 1024)] == [1, 1, 2, 2, 2, 0]
    x = jax.random.normal(jax.random.key(0), (4 * 512, 4096), jnp.bfloat16)
    got, after = run(mesh, lambda links, x: links.sum(x, GROUP), x)
    want = np.asarray(x, np.float32).reshape(4, 512, 4096).sum(axis=0)
    np.testing.assert_allclose(np.asarray(got, np.float32)[:512], want, rtol=1e-2, atol=1e-2)
    assert int(after.number[0]) == 3


def test_two_devices_send_all_of_a_sum():
    mesh = make_mesh(Layout(2), jax.devices())
    links = Links(plan_of(mesh), plan_of(mesh).make(mesh)[0])
    for rows, count in ((1, 1), (512, 1), (1024, 0)):
        assert links.count(jax.ShapeDtypeStruct((rows, 4096), jnp.bfloat16), GROUP) == count


def test_types_and_groups_that_are_left_to_xla_and_messages_of_part_of_a_word():
    mesh = make_mesh(LAYOUTS["dpa4"], jax.devices())
    links = Links(plan_of(mesh), plan_of(mesh).make(mesh)[0])
    assert links.count(jax.ShapeDtypeStruct((1, 100), jnp.float32), RANKS) == 1
    assert links.count(jax.ShapeDtypeStruct((1, 1024), jnp.int8), RANKS) == 0
    assert links.count(jax.ShapeDtypeStruct((1, 1024), jnp.float32), GROUP) == 0, "a group of one device"
    assert links.count(jax.ShapeDtypeStruct((1, 1024), jnp.float32), ("dp", "ep")) == 0, "no group"
    x = jnp.arange(4 * 3 * 5, dtype=jnp.int32).reshape(12, 5)
    got, _ = run(mesh, lambda links, x: links.gather(x, RANKS), x)
    np.testing.assert_array_equal(got, np.tile(x, (4, 1)))


def test_numbers_rise_by_one_an_exchange_of_a_group():
    mesh = make_mesh(LAYOUTS["tp4-dpa2"], jax.devices())
    arrays = LinkArrays((jnp.int32(7), jnp.int32(1)), plan_of(mesh).make(mesh)[0].mailbox)
    links = Links(plan_of(mesh), arrays)
    assert int(links.claim(GROUP, 2)) == 0
    inner = links.inside(links.arrays, links.last)
    assert int(inner.claim(RANKS, 1)) == 0
    assert int(links.claim(GROUP, 1)) == 2
    assert [int(n) for n in links.after().number] == [10, 2]


def test_no_links_without_gpus_that_reach_each_other(monkeypatch):
    assert LinkPlan.of(make_mesh(LAYOUTS["tp4"], jax.devices())) is None
    monkeypatch.setattr(links_module.ctypes, "CDLL", no_driver)
    assert not links_module._peers_reach_each_other([0, 1])


@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, None),
        ({"platform": "cpu"}, "no GPUs"),
        ({"tp": 3}, "no power of two"),
        ({"tp": 1}, "one device"),
        ({"is_multi_process": True}, "memory of another process"),
        ({"allocator": "platform"}, "memory that peers may not reach"),
        ({"reach": False}, "GPUs that do not reach each other"),
    ],
)
def test_where_gpus_exchange_and_where_xla_does(monkeypatch, change, reason):
    case = {
        "platform": "gpu", "tp": 4, "is_multi_process": False, "allocator": "bfc", "reach": True, **change
    }  # fmt: skip
    devices = [SimpleNamespace(platform=case["platform"], local_hardware_id=i) for i in range(case["tp"])]
    mesh = SimpleNamespace(
        devices=np.array(devices), shape={"dp": 1, "ep": 1, "tp": case["tp"]}, size=case["tp"],
        is_multi_process=case["is_multi_process"],
    )  # fmt: skip
    monkeypatch.setenv("XLA_PYTHON_CLIENT_ALLOCATOR", case["allocator"])
    monkeypatch.setattr(links_module, "_peers_reach_each_other", lambda ids: case["reach"])
    assert LinkPlan.of(mesh) == (LinkPlan((1, 1, 4)) if reason is None else None), reason


def no_driver(name):
    raise OSError(f"{name}: cannot open shared object file")


@pytest.mark.parametrize("reach", [True, False])
def test_every_pair_of_gpus_is_asked_for(monkeypatch, reach):
    asked = []

    class Driver:
        def cuInit(self, flags):
            return 0

        def cuDeviceCanAccessPeer(self, can, one, other):
            asked.append((one, other))
            can._obj.value = 1 if reach or len(asked) < 3 else 0
            return 0

    monkeypatch.setattr(links_module.ctypes, "CDLL", lambda name: Driver())
    assert links_module._peers_reach_each_other([0, 1, 3]) is reach
    assert asked == [(0, 1), (0, 3), (1, 0), (1, 3), (3, 0), (3, 1)][: 6 if reach else 3]


@pytest.mark.parametrize(
    "family, layout",
    [
        ("llama", {"tp": 4}),
        ("llama", {"tp": 4, "num_continuous_decode_steps": 4}),
        ("qwen3_moe", {"tp": 4, "dp_size": 2, "enable_dp_attention": True, "num_continuous_decode_steps": 4}),
        ("deepseek_v3", {"tp": 4, "dp_size": 2, "enable_dp_attention": True}),
        ("qwen3_moe", {"tp": 4, "ep": 4, "dp_size": 4, "enable_dp_attention": True}),
        ("minimax_text", {"tp": 2}),
    ],
)
def test_engines_give_the_recorded_tokens(compile_cache, monkeypatch, family, layout):
    """Numbers go from step to step, and each program's exchanges are one apart."""
    monkeypatch.setattr(LinkPlan, "of", classmethod(lambda cls, mesh: plan_of(mesh)))
    golden = Golden.read(family)
    params = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
    with jaxserve.Engine(
        model_path=str(GOLDEN / family), dtype="float32", device="cpu", skip_tokenizer_init=True,
        grammar_backend="none", compile_cache_dir=compile_cache, max_total_tokens=1024,
        max_running_requests=4, chunked_prefill_size=32, **layout,
    ) as engine:  # fmt: skip
        for _ in range(2):
            prompts = [prompt.tolist() for prompt in golden.prompts]
            check_greedy(golden, engine.generate(input_ids=prompts, sampling_params=params))
        numbers = [int(number) for number in engine._engine.runner._links.number]
        assert min(numbers) > 8, "exchanges of every group"
        assert engine.stats()["compiles_after_ready"] == 0
