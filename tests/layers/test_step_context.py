"""The step context: where keys and values land, what is dropped, and that the pool is never copied."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxserve.layers.kv import HeadSplit, KVSpec, pool_layout
from jaxserve.layers.step_context import QueryBlocks, StepContext
from jaxserve.mesh import Layout, make_mesh
from jaxserve.ops.kv_write import Heads

S, NUM_PAGES, K = 4, 6, 8


def arrays(seed=0, T=8, H=4, G=2):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=(T, n, K)), jnp.float32) for n in (H, G, G))


def step_inputs(R, rows, positions, slots, blocks, table):
    """A step whose first `rows` tokens are decode rows, of which there could be `R`."""
    return {
        "page_table_SN": jnp.asarray(table, jnp.int32),
        "position_T": jnp.asarray(positions, jnp.int32),
        "slot_T": jnp.asarray(slots, jnp.int32),
        "context_len_R": jnp.asarray(
            [positions[t] + 1 if t < rows and slots[t] >= 0 else 0 for t in range(R)], jnp.int32
        ),
        "blocks": QueryBlocks(*jnp.array(blocks, jnp.int32).T) if blocks else None,
    }


def attend(layer, pools, qkv, inputs, mesh=None, num_pages=NUM_PAGES, **options):
    context = StepContext(
        key_pages=pools[0],
        value_pages=pools[1],
        block_size=4,
        num_pages=num_pages,
        page_size=S,
        mesh=mesh,
        **inputs,
    )
    out = context.attend(layer, *map(Heads.whole, qkv), scale=0.5, **options)
    return out, (context.key_pages, context.value_pages)


# One decode row at position 5 of slot 1, a padding row, four prompt tokens of slot 0 from
# position 2 on, two padding tokens. There could be more rows: they end among the prompt's tokens.
MIXED = step_inputs(
    R=4,
    rows=2,
    positions=[5, 0, 2, 3, 4, 5, 0, 0],
    slots=[1, -1, 0, 0, 0, 0, -1, -1],
    blocks=[(0, 2, 4, 2)],
    table=[[3, 0], [5, 1]],
)


def test_keys_and_values_land_in_their_layers_pages_and_nowhere_else():
    pools = [jnp.full((3 * NUM_PAGES, S, 2, K), fill, jnp.float32) for fill in (7.0, 8.0)]
    qkv = arrays()
    _, written = attend(1, pools, qkv, MIXED)
    where = {  # token -> (page of layer 1, row)
        0: (6 + 1, 1),  # slot 1, position 5: second page, row 1
        2: (6 + 3, 2),
        3: (6 + 3, 3),
        4: (6 + 0, 0),
        5: (6 + 0, 1),
    }
    for pool, new_TGK, fill in zip(written, qkv[1:], (7.0, 8.0), strict=True):
        want = np.full(pool.shape, fill, np.float32)
        for token, at in where.items():
            want[at] = new_TGK[token]
        np.testing.assert_array_equal(pool, want)


def test_padding_rows_and_uncovered_tokens_keep_their_query():
    pools = [jnp.zeros((NUM_PAGES, S, 2, K), jnp.float32)] * 2
    qkv = arrays()
    out, _ = attend(0, pools, qkv, MIXED)
    kept = np.asarray(out == qkv[0]).all(axis=(1, 2))
    assert kept.tolist() == [False, True, False, False, False, False, True, True]


def test_token_attends_its_own_key_written_in_this_step():
    """The first token of a sequence sees only itself: the output is its value."""
    pools = [jnp.full((NUM_PAGES, S, 2, K), jnp.nan, jnp.float32)] * 2
    qkv = arrays(T=1)
    inputs = step_inputs(R=1, rows=1, positions=[0], slots=[1], blocks=[], table=[[0, 1], [2, 3]])
    out, _ = attend(0, pools, qkv, inputs)
    np.testing.assert_allclose(out, np.repeat(qkv[2], 2, axis=1), atol=1e-6)


def test_pool_in_a_narrower_dtype_takes_the_rounded_keys():
    pools = [jnp.zeros((NUM_PAGES, S, 2, K), jnp.bfloat16)] * 2
    qkv = arrays()
    out, written = attend(0, pools, qkv, MIXED)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(written[0][1, 1], qkv[1][0].astype(jnp.bfloat16))


@pytest.mark.parametrize("devices", [1, 2])
def test_no_layer_copies_the_pool(devices):
    """Three layers over pools of 25 MB; what the program needs beside them does not grow with them."""
    num_pages = 16384
    mesh = make_mesh(Layout(devices), jax.devices()) if devices > 1 else None
    shape, spec = pool_layout(KVSpec(3, 2, K), 4, num_pages=num_pages, page_size=S, mesh=mesh)
    pools = [jnp.zeros(shape, jnp.float32) for _ in range(2)]
    if mesh is not None:
        pools = [jax.device_put(pool, NamedSharding(mesh, spec)) for pool in pools]

    def three_layers(pools, x_THK):
        for layer in range(3):  # as in a model, keys of a layer depend on the layer before
            qkv = (x_THK, x_THK[:, :2] + 1, x_THK[:, 2:] - 1)
            x_THK, pools = attend(layer, pools, qkv, MIXED, mesh, num_pages)
        return x_THK, pools

    compiled = jax.jit(three_layers, donate_argnums=0).lower(pools, arrays()[0]).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    local_bytes = sum(pool.nbytes for pool in pools) // devices
    assert memory.temp_size_in_bytes < local_bytes / 20
    assert memory.alias_size_in_bytes >= local_bytes


# Groups that divide the KV heads, hold one each, share one, and one whose border lies within the
# query heads of a KV head (12 query heads on 3 KV heads over 2 devices).
SPLITS = [(8, 4, 2), (4, 2, 2), (8, 2, 4), (8, 1, 4), (12, 3, 2), (12, 3, 4), (9, 3, 3)]


@pytest.mark.parametrize("H, G, group", SPLITS)
def test_each_device_holds_exactly_the_kv_heads_its_query_heads_read(H, G, group):
    split = HeadSplit(H, G, group)
    for device in range(group):
        queries = device * split.num_q + np.arange(split.num_q)
        held = np.asarray(split.heads_of(jnp.int32(device)))
        np.testing.assert_array_equal(np.repeat(held, split.run), queries // (H // G))


@pytest.mark.parametrize("H, G, group", SPLITS)
@pytest.mark.parametrize("options", [{}, {"window": 3, "softcap": 2.0}], ids=["plain", "window"])
def test_mesh_of_any_head_split_attends_like_one_device(H, G, group, options):
    qkv = arrays(H=H, G=G)
    sinks_H = jnp.linspace(-1.0, 1.0, H)

    def run(mesh):
        shape, spec = pool_layout(KVSpec(1, G, K), H, num_pages=NUM_PAGES, page_size=S, mesh=mesh)
        pools = [jnp.zeros(shape, jnp.float32) for _ in range(2)]
        if mesh is not None:
            pools = [jax.device_put(pool, NamedSharding(mesh, spec)) for pool in pools]
        step = jax.jit(lambda pools, qkv: attend(0, pools, qkv, MIXED, mesh, sinks_H=sinks_H, **options)[0])
        return step(pools, qkv)

    mesh = make_mesh(Layout(group), jax.devices())
    np.testing.assert_allclose(run(mesh), run(None), atol=1e-6)  # the same sums, other loops


def test_pool_of_another_layout_is_reported_with_both_numbers():
    pools = [jnp.zeros((NUM_PAGES, S, 3, K), jnp.float32)] * 2
    with pytest.raises(AssertionError, match="pool has 3 heads, the layout 1 x 2"):
        attend(0, pools, arrays(), MIXED)
