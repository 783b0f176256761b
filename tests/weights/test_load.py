"""Filling a model: placement, dtype, splitting, and what is refused before anything is read."""

import logging

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.layers.weight import weight
from jaxserve.weights import CheckpointError, load, load_dummy, open_checkpoint
from tests.weights.tiny import write_directory


def on_devices(count, *spec):
    """A sharding over the first `count` of the eight CPU devices."""
    return NamedSharding(Mesh(np.array(jax.devices()[:count]), ("tp",)), PartitionSpec(*spec))


class Model(nnx.Module):
    def __init__(self, *weights):
        self.weights = nnx.List(weights)


def fill(model, checkpoint, sharding=None):
    seen = []
    load(
        model,
        checkpoint,
        lambda param: sharding or on_devices(1),
        lambda done, total: seen.append((done, total)),
    )
    return seen


def test_each_param_becomes_an_array_of_its_own_dtype(tmp_path):
    tensors = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "n.weight": np.ones(3, np.float32)}
    write_directory(tmp_path, tensors)
    model = Model(
        weight((2, 3), (None, None), "a.weight", dtype=jnp.bfloat16),
        weight((3,), (None,), "n.weight", dtype=jnp.float32),
    )
    seen = fill(model, open_checkpoint(tmp_path))
    assert model.weights[0][...].dtype == jnp.bfloat16
    assert model.weights[1][...].dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(model.weights[0][...], np.float32), tensors["a.weight"])
    assert seen == [(0, 24), (12, 24), (24, 24)]


def test_bfloat16_is_loaded_bit_for_bit(tmp_path):
    values = np.array([[1.0, -0.0, 3.14, 1e30, float("inf"), 2**-130]], ml_dtypes.bfloat16)
    write_directory(tmp_path, {"a.weight": values})
    model = Model(weight((1, 6), (None, None), "a.weight", dtype=jnp.bfloat16))
    fill(model, open_checkpoint(tmp_path))
    np.testing.assert_array_equal(np.asarray(model.weights[0][...]).view(np.uint16), values.view(np.uint16))


def test_a_device_reads_only_its_own_rows(tmp_path):
    values = np.arange(32, dtype=np.float32).reshape(8, 4)
    write_directory(tmp_path, {"q.weight": values})
    checkpoint = open_checkpoint(tmp_path)
    reads = []
    read = checkpoint.read
    checkpoint.read = lambda name, index=None: reads.append(index) or read(name, index)
    model = Model(weight((2, 4, 4), ("q_heads", None, None), "q.weight", dtype=jnp.float32))
    fill(model, checkpoint, on_devices(2, "tp"))
    assert reads == [(slice(0, 4), slice(0, 4)), (slice(4, 8), slice(0, 4))]
    np.testing.assert_array_equal(np.asarray(model.weights[0][...]), values.reshape(2, 4, 4))


def test_sharding_an_inner_split_dimension_gives_the_same_array(tmp_path):
    values = np.arange(32, dtype=np.float32).reshape(8, 4)
    write_directory(tmp_path, {"q.weight": values})
    for spec in ((None, "tp"), (None, None, "tp")):
        model = Model(weight((2, 4, 4), (None, None, None), "q.weight", dtype=jnp.float32))
        fill(model, open_checkpoint(tmp_path), on_devices(2, *spec))
        np.testing.assert_array_equal(np.asarray(model.weights[0][...]), values.reshape(2, 4, 4))


def test_sources_are_assembled_once_however_many_devices_there_are(tmp_path):
    a, b = np.full((2, 4), 1, np.float32), np.full((2, 4), 2, np.float32)
    write_directory(tmp_path, {"a.weight": a, "b.weight": b})
    calls = []

    def stack(*sources):
        calls.append(len(sources))
        return np.stack(sources)

    model = Model(weight((2, 2, 4), (None,) * 3, "a.weight", "b.weight", dtype=jnp.float32, assemble=stack))
    fill(model, open_checkpoint(tmp_path), on_devices(2, "tp"))
    assert calls == [2]
    np.testing.assert_array_equal(np.asarray(model.weights[0][...]), np.stack([a, b]))


@pytest.mark.parametrize(
    ("stored", "declared", "expected"),
    [
        ((2, 3), (3, 2), r"shape \[2, 3\], expected \[3, 2\]"),
        ((1, 2, 3), (2, 3), r"shape \[1, 2, 3\], expected \[2, 3\]"),
        ((6,), (2, 4), r"shape \[6\], expected \[8\]"),
        ((4, 3), (2, 3, 3), r"shape \[4, 3\], expected \[6, 3\]"),
    ],
)
def test_a_misshapen_tensor_is_named_with_file_got_and_expected(tmp_path, stored, declared, expected):
    write_directory(tmp_path, {"a.weight": np.zeros(stored, np.float32)})
    model = Model(weight(declared, (None,) * len(declared), "a.weight", dtype=jnp.float32))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor a\.weight has {expected}"):
        fill(model, open_checkpoint(tmp_path))


def test_a_missing_tensor_is_named_before_anything_is_read(tmp_path):
    write_directory(tmp_path, {"a.weight": np.zeros((2, 3), np.float32)})
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.read = lambda *args: pytest.fail("read before every shape was checked")
    model = Model(
        weight((2, 3), (None, None), "a.weight", dtype=jnp.float32),
        weight((2, 3), (None, None), "b.weight", dtype=jnp.float32),
    )
    with pytest.raises(CheckpointError, match=r"tensor b\.weight is missing"):
        fill(model, checkpoint)


def test_sources_that_do_not_assemble_are_named_with_their_shapes(tmp_path):
    write_directory(
        tmp_path, {"a.weight": np.zeros((2, 3), np.float32), "b.weight": np.zeros((2, 4), np.float32)}
    )
    model = Model(
        weight(
            (2, 2, 3),
            (None,) * 3,
            "a.weight",
            "b.weight",
            dtype=jnp.float32,
            assemble=lambda a, b: np.stack([a, b]),
        )
    )
    with pytest.raises(
        CheckpointError, match=r"a\.weight \[2, 3\], b\.weight \[2, 4\] do not make weights\.0"
    ):
        fill(model, open_checkpoint(tmp_path))


def test_unused_tensors_are_named_in_one_warning_and_computed_buffers_are_not(tmp_path, caplog):
    tensors = {
        "a.weight": np.zeros((2, 3), np.float32),
        "vision.weight": np.zeros(2, np.float32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32),
        "lm_head.weight": np.zeros((2, 3), np.float32),
    }
    write_directory(tmp_path, tensors, config={"tie_word_embeddings": True})
    model = Model(weight((2, 3), (None, None), "a.weight", dtype=jnp.float32))
    with caplog.at_level(logging.WARNING):
        fill(model, open_checkpoint(tmp_path))
    assert [r.getMessage() for r in caplog.records] == [
        f"{tmp_path}: 1 tensors are not used by this model: vision.weight"
    ]


def test_a_file_cut_after_opening_is_an_error_that_names_the_tensor(tmp_path):
    write_directory(tmp_path, {"a.weight": np.ones((64, 64), np.float32)})
    checkpoint = open_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    model = Model(weight((64, 64), (None, None), "a.weight", dtype=jnp.float32))
    with pytest.raises(
        CheckpointError, match=r"truncated at tensor a\.weight \[64, 64\]: expected 16384 bytes"
    ):
        fill(model, checkpoint)


def test_a_file_cut_or_gone_after_opening_is_named_for_a_part_too(tmp_path):
    write_directory(tmp_path, {"a.weight": np.ones((64, 64), np.float32)})
    checkpoint = open_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"truncated at tensor a\.weight \[64, 64\]"):
        checkpoint.read("a.weight", (slice(None), slice(0, 8)))
    file.unlink()
    for index in (None, (slice(None), slice(0, 8))):
        with pytest.raises(CheckpointError, match=r"model\.safetensors: .*No such file"):
            checkpoint.read("a.weight", index)


def dummy_model(shape=(64, 48)):
    return Model(
        weight(shape, (None, None), "a.weight", dtype=jnp.float32),
        weight(shape, (None, None), "b.weight", dtype=jnp.bfloat16),
        weight((48,), (None,), "norm.weight", dtype=jnp.float32),
        weight((48,), (None,), "a.bias", dtype=jnp.float32),
        weight((48,), (None,), "shifted_norm.weight", dtype=jnp.float32, init="zeros"),
    )


def test_dummy_weights_have_fan_in_scale_and_norms_of_one():
    model = dummy_model()
    load_dummy(model, lambda param: on_devices(1), 0, lambda done, total: None)
    a, b, norm, bias, shifted = (np.asarray(w[...], np.float32) for w in model.weights)
    # 3072 uniform draws: the deviation's own relative error is below 1 %, five of them is 5 %.
    assert abs(a.std() * np.sqrt(48) - 1) < 0.05
    assert abs(b.std() * np.sqrt(48) - 1) < 0.05
    assert np.abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.1
    assert np.abs(np.corrcoef(a[1:].ravel(), a[:-1].ravel())[0, 1]) < 0.1
    assert len(np.unique(a)) > 3000
    assert (norm == 1).all() and (bias == 0).all() and (shifted == 0).all()
    assert model.weights[1][...].dtype == jnp.bfloat16


def test_dummy_weights_depend_on_the_seed_and_not_on_the_sharding():
    draws = []
    for seed, sharding in ((3, on_devices(1)), (3, on_devices(2, "tp")), (4, on_devices(1))):
        model = dummy_model()
        load_dummy(model, lambda param, s=sharding: s, seed, lambda done, total: None)
        draws.append(np.asarray(model.weights[0][...]))
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).mean() > 0.9


def test_float16_and_float8_sources_are_converted_by_value(tmp_path):
    tensors = {
        "a.weight": np.array([[0.5, -2.0]], np.float16),
        "b.weight": np.array([[1.5, 240.0]], ml_dtypes.float8_e4m3fn),
    }
    write_directory(tmp_path, tensors)
    model = Model(*(weight((1, 2), (None, None), name, dtype=jnp.float32) for name in tensors))
    fill(model, open_checkpoint(tmp_path))
    assert [np.asarray(w[...]).tolist() for w in model.weights] == [[[0.5, -2.0]], [[1.5, 240.0]]]


@pytest.mark.parametrize(
    "tensors, message",
    [
        (
            {"a.weight": np.ones((1, 2), np.int8)},
            "a.weight holds int8, but this model reads it as numbers of float32",
        ),
        (
            {
                "a.weight": np.ones((1, 2), ml_dtypes.float8_e4m3fn),
                "a.weight_scale_inv": np.ones((1, 1), np.float32),
            },
            "a.weight is quantised .a.weight_scale_inv is beside it",
        ),
    ],
)
def test_quantised_numbers_are_not_taken_for_weights(tmp_path, tensors, message):
    write_directory(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=message):
        fill(Model(weight((1, 2), (None, None), "a.weight", dtype=jnp.float32)), open_checkpoint(tmp_path))
