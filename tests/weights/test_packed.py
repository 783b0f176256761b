"""Integers packed in words of 32, in each published format, against codes written out one by one."""

import json

import ml_dtypes
import numpy as np
import pytest

from jaxserve.weights import CheckpointError, open_checkpoint
from jaxserve.weights.grouped import GroupedCheckpoint
from tests.weights.tiny import write_directory

N, K, GROUP = 16, 96, 32
NAME = "model.layers.0.mlp.up_proj.weight"
MODULE = NAME.removesuffix(".weight")
ARCHITECTURE = {"architectures": ["LlamaForCausalLM"]}
AWQ_PLACES = {0: 0, 1: 4, 2: 1, 3: 5, 4: 2, 5: 6, 6: 3, 7: 7}
"""Output -> its place in a word."""


def packed(**weights):
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, **weights}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


GPTQ = {"quant_method": "gptq", "group_size": GROUP}
KINDS = {
    "awq": {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": GROUP},
    "gptq": {**GPTQ, "bits": 4},
    "gptq in 8 bits": {**GPTQ, "bits": 8},
    "gptq_v2": {**GPTQ, "bits": 4, "checkpoint_format": "gptq_v2"},
    "gptq of one group": {**GPTQ, "bits": 4, "group_size": -1},
    "gptq with act-order": {**GPTQ, "bits": 4, "desc_act": True},
    "packed": packed(symmetric=True),
    "packed with zeros": packed(symmetric=False),
    "packed in 8 bits": packed(symmetric=False, num_bits=8),
    "packed a channel": packed(symmetric=False, strategy="channel"),
    "packed with act-order": packed(symmetric=False, actorder="group"),
}
IN_A_ROW = [kind for kind in KINDS if "act-order" not in kind]


def pack(codes, bits, place=lambda i: i):
    """int32 words of each row of codes, put together as Python integers."""
    each = 32 // bits
    words = np.zeros((len(codes), -(-codes.shape[1] // each)), np.uint32)
    for row, out in zip(codes.tolist(), words):
        for i, code in enumerate(row):
            out[i // each] |= np.uint32(code << bits * place(i % each))
    return words.view(np.int32)


class Made:
    """Random codes, scales and zeros of one weight, stored as `kind` says, and what they mean."""

    def __init__(self, kind, seed=0):
        rng, self.given = np.random.default_rng(seed), KINDS[kind]
        weights = self.given.get("config_groups", {}).get("group_0", {}).get("weights", {})
        bits = self.given.get("bits") or weights["num_bits"]
        one = self.given.get("group_size") == -1 or weights.get("strategy") == "channel"
        self.group_K = np.zeros(K, int) if one else np.arange(K) // GROUP
        if "act-order" in kind:
            self.group_K = rng.permutation(self.group_K)
        groups = 1 if one else K // GROUP
        self.codes = rng.integers(0, 2**bits, (N, K)).astype(np.uint8)
        self.scales = rng.uniform(0.01, 1, (N, groups)).astype(np.float16)
        self.zeros = rng.integers(0, 2**bits, (N, groups)).astype(np.uint8)
        if kind == "packed":
            self.zeros[:] = 8
        self.tensors = self._store(kind, bits)

    def _store(self, kind, bits):
        if self.given["quant_method"] == "compressed-tensors":
            out = {
                "weight_packed": pack(self.codes, bits),
                "weight_scale": self.scales.astype(ml_dtypes.bfloat16),
                "weight_shape": np.array([N, K]),
            }
            self.scales = out["weight_scale"].astype(np.float32)
            if kind != "packed":
                out["weight_zero_point"] = pack(self.zeros.T, bits).T
            if "act-order" in kind:
                out["weight_g_idx"] = self.group_K.astype(np.int32)
        elif kind == "awq":
            rows = [pack(codes.T, 4, AWQ_PLACES.get) for codes in (self.codes, self.zeros)]
            out = {"qweight": rows[0], "qzeros": rows[1], "scales": self.scales.T}
        else:
            qzeros = pack(self.zeros.T, bits).view(np.uint32)
            if kind != "gptq_v2":  # the writer subtracts from whole words: zeros of 0 borrow
                qzeros = qzeros - np.uint32(0x11111111 if bits == 4 else 0x01010101)
            out = {
                "qweight": pack(self.codes, bits).T,
                "qzeros": qzeros.view(np.int32),
                "scales": self.scales.T,
                "g_idx": self.group_K.astype(np.int32),
            }
        return {f"{MODULE}.{part}": np.ascontiguousarray(array) for part, array in out.items()}

    @property
    def wide(self):
        steps = self.codes.astype(np.float32) - self.zeros.astype(np.float32)[:, self.group_K]
        return steps * self.scales.astype(np.float32)[:, self.group_K]

    def open(self, path, **change):
        plain = {"model.embed_tokens.weight": np.ones((4, K), np.float32)}
        tensors = {
            name: array for name, array in (plain | self.tensors | change).items() if array is not None
        }
        config = {**ARCHITECTURE, "quantization_config": self.given}
        return open_checkpoint(write_directory(path, tensors, config))


@pytest.mark.parametrize("kind", KINDS)
def test_weight_is_what_its_codes_scales_and_zeros_say(kind, tmp_path):
    made = Made(kind)
    checkpoint = made.open(tmp_path)
    assert checkpoint.tensors[NAME].shape == (N, K) and checkpoint.tensors[NAME].dtype == np.float32
    np.testing.assert_array_equal(checkpoint.read(NAME), made.wide)


@pytest.mark.parametrize("kind", IN_A_ROW)
def test_parts_are_shown_beside_the_weight_and_nothing_else_of_it(kind, tmp_path):
    made = Made(kind)
    checkpoint = made.open(tmp_path)
    names = {"codes": made.codes, "scales": made.scales.astype(np.float32), "zeros": made.zeros}
    assert set(checkpoint.tensors) == {"model.embed_tokens.weight", NAME, *(f"{NAME}.{n}" for n in names)}
    for name, want in names.items():
        got, info = checkpoint.read(f"{NAME}.{name}"), checkpoint.tensors[f"{NAME}.{name}"]
        np.testing.assert_array_equal(got, want)
        assert (got.dtype, got.shape) == (info.dtype, info.shape) == (want.dtype, want.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_part_of_a_weight_is_what_slicing_the_whole_gives(kind, tmp_path):
    made = Made(kind)
    checkpoint = made.open(tmp_path)
    for rows, columns in (
        (slice(3, 7), slice(None)),
        (slice(None), slice(32, 64)),
        (slice(8, 16), slice(5, 71)),
        (slice(9, 9), slice(3, 3)),
    ):
        np.testing.assert_array_equal(checkpoint.read(NAME, (rows, columns)), made.wide[rows, columns])
        if kind in IN_A_ROW:
            codes = checkpoint.read(f"{NAME}.codes", (rows, columns))
            np.testing.assert_array_equal(codes, made.codes[rows, columns])
            for part, want in (("scales", made.scales), ("zeros", made.zeros)):
                got = checkpoint.read(f"{NAME}.{part}", (rows, slice(0, 1)))
                np.testing.assert_array_equal(got, want[rows, :1])


@pytest.mark.parametrize("kind", ["gptq with act-order", "packed with act-order"])
def test_permuted_groups_have_no_parts(kind, tmp_path):
    checkpoint = Made(kind).open(tmp_path)
    assert set(checkpoint.tensors) == {"model.embed_tokens.weight", NAME}
    assert checkpoint.config["quantization_config"]["is_ordered"] is True


def test_act_order_that_left_groups_in_a_row_has_its_parts(tmp_path):
    made = Made("gptq with act-order")
    made.group_K = np.arange(K) // GROUP
    checkpoint = made.open(tmp_path, **{f"{MODULE}.g_idx": made.group_K.astype(np.int32)})
    assert checkpoint.config["quantization_config"]["is_ordered"] is False
    np.testing.assert_array_equal(checkpoint.read(f"{NAME}.codes"), made.codes)
    np.testing.assert_array_equal(checkpoint.read(NAME), made.wide)


def test_groups_that_were_never_given_an_order_are_in_a_row(tmp_path):
    made = Made("packed with zeros")
    checkpoint = made.open(tmp_path, **{f"{MODULE}.weight_g_idx": np.full(K, -1, np.int32)})
    np.testing.assert_array_equal(checkpoint.read(NAME), made.wide)


def test_file_without_the_order_of_groups_has_them_in_a_row(tmp_path):
    made = Made("gptq")
    np.testing.assert_array_equal(made.open(tmp_path, **{f"{MODULE}.g_idx": None}).read(NAME), made.wide)


def test_config_of_an_opened_checkpoint_says_what_lies_in_the_files(tmp_path):
    checkpoint = Made("awq").open(tmp_path, **{"model.norm.weight": np.ones(K, np.float32)})
    assert isinstance(checkpoint, GroupedCheckpoint)
    assert checkpoint.config == {
        **ARCHITECTURE,
        "quantization_config": {
            "quant_method": "groups",
            "bits": 4,
            "group_size": 32,
            "is_ordered": False,
            "modules_to_not_convert": ["model.embed_tokens"],
        },
    }


def test_files_without_packed_weights_are_plain_whatever_config_says(tmp_path):
    config = {**ARCHITECTURE, "quantization_config": KINDS["gptq"]}
    write_directory(tmp_path, {NAME: np.ones((N, K), np.float32)}, config)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config == ARCHITECTURE and set(checkpoint.tensors) == {NAME}


@pytest.mark.parametrize("file, kind", [("quantize_config.json", "gptq"), ("quant_config.json", "awq")])
def test_quantization_in_a_file_of_its_own_is_read(file, kind, tmp_path):
    made = Made(kind)
    given = {"w_bit": 4, "q_group_size": GROUP, "version": "GEMM", "zero_point": True}
    write_directory(tmp_path, made.tensors, ARCHITECTURE)
    (tmp_path / file).write_text(json.dumps({"bits": 4, "group_size": GROUP} if kind == "gptq" else given))
    np.testing.assert_array_equal(open_checkpoint(tmp_path).read(NAME), made.wide)


# ---- damaged files ----


def zeros(*shape, dtype=np.int32):
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    "kind, change, message",
    [
        ("gptq", {"scales": None}, r"scales is missing; \S+\.qweight needs it"),
        ("awq", {"qzeros": None}, r"qzeros is missing; \S+\.qweight needs it"),
        ("packed with zeros", {"weight_zero_point": None}, r"weight_zero_point is missing"),
        ("gptq", {"qweight": zeros(12, N, dtype=np.int64)}, r"qweight is int64 \[12, 16\], expected .*int32"),
        ("gptq", {"qweight": zeros(12 * N)}, r"qweight is int32 \[192\], expected a matrix of int32"),
        ("gptq", {"scales": zeros(3, N)}, r"scales is int32 \[3, 16\], expected a matrix of floats"),
        ("gptq", {"scales": zeros(3, 8, dtype=np.float16)}, r"scales \[3, 8\] does not fit \S+qweight"),
        ("gptq", {"scales": zeros(2, N, dtype=np.float16)}, r"qzeros \[3, 2\] does not fit"),
        ("gptq", {"qzeros": zeros(3, 4)}, r"qzeros \[3, 4\] does not fit \S+qweight \[12, 16\] .* 4 bits"),
        ("gptq", {"g_idx": zeros(K + 1)}, r"g_idx \[97\] does not fit \S+qweight"),
        ("gptq in 8 bits", {"qweight": zeros(12, N)}, r"scales \[3, 16\] does not fit .* of 8 bits"),
        ("awq", {"qweight": zeros(64, 2)}, r"scales \[3, 16\] does not fit \S+qweight \[64, 2\]"),
        ("packed", {"weight_packed": zeros(N, 13)}, r"weight_packed \[16, 13\] does not fit \S+scale"),
        ("packed", {"weight_scale": zeros(N, 1, dtype=np.float16)}, r"weight_packed .* does not fit"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named_when_opening(kind, change, message, tmp_path):
    change = {f"{MODULE}.{part}": array for part, array in change.items()}
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor {MODULE}\.{message}"):
        Made(kind).open(tmp_path, **change)


@pytest.mark.parametrize(
    "kind, part, array, message",
    [
        ("gptq", "g_idx", np.arange(K) // GROUP + 1, r"g_idx has groups 1 to 3, expected 0 to 2"),
        ("gptq", "g_idx", np.arange(K) // GROUP - 1, r"g_idx has groups -1 to 1, expected 0 to 2"),
        ("packed", "weight_shape", np.array([K, N]), r"weight_shape says \[96, 16\], but \S+ is of \[16, 9"),
    ],
)  # fmt: skip
def test_values_that_do_not_fit_are_named_when_reading(kind, part, array, message, tmp_path):
    kept = array.astype(np.int32)
    checkpoint = Made(kind).open(tmp_path, **{f"{MODULE}.{part}": kept})
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor {MODULE}\.{message}"):
        checkpoint.read(NAME)


def test_codes_of_groups_that_the_config_says_are_in_a_row_and_are_not(tmp_path):
    order = np.random.default_rng(3).permutation(np.arange(K) // GROUP).astype(np.int32)
    checkpoint = Made("gptq").open(tmp_path, **{f"{MODULE}.g_idx": order})
    with pytest.raises(CheckpointError, match=rf"{NAME} has groups of any inputs, but config\.json says"):
        checkpoint.read(f"{NAME}.codes")
