"""Stacked parameters: a device reads the slices it keeps and no others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from jaxserve.layers.weight import Sliced, Stacked, reorder, weight
from jaxserve.weights import CheckpointError, fill, load, load_dummy, open_checkpoint

E, F, D = 4, 6, 5
RNG = np.random.default_rng(0)
EXPERTS = [RNG.normal(size=(F, D)).astype(np.float32) for _ in range(E)]
FUSED = RNG.normal(size=(E, D, F)).astype(np.float32)


class Model(nnx.Module):
    def __init__(self):
        axes = ("expert", None, None)
        names = [f"experts.{e}.weight" for e in range(E)]
        self.stacked = weight((E, F, D), axes, *names, dtype=jnp.float32, assemble=Stacked())
        pairs = [name for e in range(E) for name in (names[e], names[E - 1 - e])]
        self.made = weight(
            (E, F, D), axes, *pairs, dtype=jnp.float32, assemble=Stacked(lambda a, b: a - b, num_sources=2)
        )
        self.sliced = weight((E, F, D), axes, "fused", dtype=jnp.float32, assemble=Sliced(np.transpose))


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file(
        {**{f"experts.{e}.weight": x for e, x in enumerate(EXPERTS)}, "fused": FUSED},
        tmp_path / "model.safetensors",
    )
    return open_checkpoint(tmp_path)


def sharded(num_devices):
    mesh = Mesh(np.array(jax.devices()[:num_devices]), ("ep",))
    return lambda _: NamedSharding(mesh, PartitionSpec("ep"))


@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_slices_are_assembled_in_order_on_any_number_of_devices(checkpoint, num_devices):
    model = Model()
    load(model, checkpoint, sharded(num_devices), lambda *_: None)
    np.testing.assert_array_equal(model.stacked[...], np.stack(EXPERTS))
    np.testing.assert_array_equal(
        model.made[...], np.stack([EXPERTS[e] - EXPERTS[E - 1 - e] for e in range(E)])
    )
    np.testing.assert_array_equal(model.sliced[...], FUSED.transpose(0, 2, 1))


def test_whole_assembly_gives_what_reading_by_slices_gives(checkpoint):
    """Other users of a parameter's declaration assemble it at once."""
    model = Model()
    params = (model.stacked, model.made, model.sliced)
    wholes = [p.assemble(*(checkpoint.read(source) for source in p.sources)) for p in params]
    load(model, checkpoint, sharded(1), lambda *_: None)
    for param, whole in zip(params, wholes, strict=True):
        np.testing.assert_array_equal(param[...], whole)


def test_slices_in_another_order_and_more_than_once(checkpoint):
    order = [2, 0, 1, 3, 2, 2, 0, 1]
    model = Model()
    for param in (model.stacked, model.made, model.sliced):
        reorder(param, order)
    load(model, checkpoint, sharded(4), lambda *_: None)
    want = Model()
    load(want, checkpoint, sharded(1), lambda *_: None)
    for name in ("stacked", "made", "sliced"):
        got, plain = getattr(model, name), getattr(want, name)
        np.testing.assert_array_equal(got[...], plain[...][np.array(order)])
        np.testing.assert_array_equal(got[...], got.assemble(*map(checkpoint.read, got.sources)))


def test_random_slices_are_as_equal_as_those_of_a_checkpoint():
    plain, model = Model(), Model()
    reorder(model.stacked, [1, 0, 1, 3])
    for made in (plain, model):
        load_dummy(made, sharded(2), 5, lambda *_: None)
    np.testing.assert_array_equal(model.stacked[...], plain.stacked[...][np.array([1, 0, 1, 3])])


def test_a_device_reads_only_its_slices(checkpoint, monkeypatch):
    """A process with two of four experts: of the others no byte is read."""
    read, original = [], checkpoint.read
    monkeypatch.setattr(
        checkpoint, "read", lambda name, index=None: read.append((name, index)) or original(name, index)
    )
    model = Model()
    index = (slice(2, 4), slice(0, F), slice(0, D))
    part = fill._reader(checkpoint, "stacked", model.stacked)(index)
    np.testing.assert_array_equal(part, np.stack(EXPERTS[2:]))
    assert [name for name, _ in read] == ["experts.2.weight", "experts.3.weight"]
    read.clear()
    part = fill._reader(checkpoint, "sliced", model.sliced)(index)
    np.testing.assert_array_equal(part, FUSED[2:].transpose(0, 2, 1))
    assert [index[0] for _, index in read] == [slice(2, 3), slice(3, 4)]


def test_an_expert_of_another_shape_is_named_before_anything_is_read(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    tensors = {f"experts.{e}.weight": x for e, x in enumerate(EXPERTS)}
    tensors["experts.2.weight"] = np.zeros((F, D + 1), np.float32)
    save_file({**tensors, "fused": FUSED}, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"tensor experts\.2\.weight has shape \[6, 6\], expected \[6, 5\]"
    ):
        load(Model(), open_checkpoint(tmp_path), sharded(1), lambda *_: None)
