"""Tokenizers inside GGUF files behave as the tokenizer.json they were made from."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from jaxserve.weights import CheckpointError, open_checkpoint
from tests.weights.tiny import LLAMA, byte_tokenizer, write_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def open_with(tmp_path, tokenizer):
    tensors = {"token_embd.weight": np.zeros((8, 64), np.float32)}
    return open_checkpoint(write_gguf(tmp_path / "t.gguf", "llama", LLAMA, tensors, tokenizer=tokenizer))


def tokenizer_of(tmp_path, tokenizer) -> Tokenizer:
    return Tokenizer.from_file(str(open_with(tmp_path, tokenizer).tokenizer_dir / "tokenizer.json"))


def spm_tokenizer(**more):
    """Unknown, two control tokens, a user-defined one, every byte, and words with scores."""
    pieces = {"▁": -1.0, "h": -2.0, "i": -2.0, "▁h": -4.0, "hi": -3.0, "▁hi": -5.0}
    tokens = ["<unk>", "<s>", "</s>", "<sep>", *(f"<0x{b:02X}>" for b in range(256)), *pieces]
    return {
        "ggml.model": "llama",
        "ggml.tokens": tokens,
        "ggml.token_type": [2, 3, 3, 4] + [6] * 256 + [1] * len(pieces),
        "ggml.scores": [0.0] * 260 + list(pieces.values()),
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.unknown_token_id": 0,
    } | {f"ggml.{key}": value for key, value in more.items()}


TEXTS = (
    "hello world",
    "  two  spaces\n\n\ttab\r\n",
    "naïve 漢字 🙂👩‍👧 e\u0301",
    "x=1234567; 3.14",
    "don't I'LL",
    "\u00a0\u200b\x00",
)


@pytest.mark.parametrize("pre", ["gpt-2", "default", "smollm", "llama-bpe"])
def test_any_text_survives_encoding_and_decoding(tmp_path, pre):
    tokenizer = tokenizer_of(tmp_path, byte_tokenizer(pre) | {"ggml.add_bos_token": False})
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_string_survives_byte_level_bpe(tmp_path, text):
    tokenizer = tokenizer_of(tmp_path, byte_tokenizer("smollm"))
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_merges_are_applied_in_their_order(tmp_path):
    tokenizer = tokenizer_of(tmp_path, byte_tokenizer())
    assert tokenizer.encode("hello well").tokens == ["hello", "Ġw", "e", "ll"]


def test_special_tokens_are_one_id_and_left_out_of_text(tmp_path):
    tokenizer = tokenizer_of(tmp_path, byte_tokenizer())
    ids = tokenizer.encode("<|im_start|>hello<|im_end|>").ids
    assert ids == [1, tokenizer.token_to_id("hello"), 2]
    assert tokenizer.decode(ids) == "hello"


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["it", "'s", "Ġ12345", "ĠA", "'", "S", "ĠĊ", "Ġx"]),
        ("smollm", ["it", "'s", "Ġ", "1", "2", "3", "4", "5", "ĠA", "'", "S", "ĠĊ", "Ġx"]),
        ("llama-bpe", ["it", "'s", "Ġ", "123", "45", "ĠA", "'S", "ĠĊ", "Ġx"]),
        ("qwen2", ["it", "'s", "Ġ", "1", "2", "3", "4", "5", "ĠA", "'S", "ĠĊ", "Ġx"]),
    ],
)
def test_each_pre_tokenizer_cuts_words_its_own_way(tmp_path, pre, pieces):
    tokenizer = tokenizer_of(tmp_path, byte_tokenizer(pre))
    cut = tokenizer.pre_tokenizer.pre_tokenize_str("it's 12345 A'S \n x")
    assert [piece for piece, _ in cut] == pieces


def test_qwen_normalises_to_composed_characters(tmp_path):
    tokenizer = tokenizer_of(tmp_path, byte_tokenizer("qwen2"))
    assert tokenizer.decode(tokenizer.encode("e\u0301").ids) == "\u00e9"


def test_llama3_takes_a_whole_word_token_without_merges(tmp_path):
    spec = byte_tokenizer("llama-bpe")
    spec["ggml.tokens"] = [*spec["ggml.tokens"], "zzz"]
    spec["ggml.token_type"] = [*spec["ggml.token_type"], 1]
    assert tokenizer_of(tmp_path, spec).encode("zzz", add_special_tokens=False).tokens == ["zzz"]
    spec["ggml.pre"] = "gpt-2"
    assert tokenizer_of(tmp_path, spec).encode("zzz").tokens == ["z", "z", "z"]


@pytest.mark.parametrize(
    ("spec", "first"),
    [
        (byte_tokenizer("llama-bpe"), ["<|im_start|>"]),
        (byte_tokenizer("llama-bpe") | {"ggml.add_bos_token": False}, []),
        (byte_tokenizer("smollm"), []),
        (byte_tokenizer("smollm") | {"ggml.add_bos_token": True}, ["<|im_start|>"]),
        (spm_tokenizer(), ["<s>"]),
    ],
)
def test_a_beginning_token_is_added_where_the_file_or_its_kind_says(tmp_path, spec, first):
    checkpoint = open_with(tmp_path, spec)
    tokenizer = Tokenizer.from_file(str(checkpoint.tokenizer_dir / "tokenizer.json"))
    tokens = tokenizer.encode("h").tokens
    assert tokens[: len(tokens) - len(tokenizer.encode("h", add_special_tokens=False).tokens)] == first
    config = json.loads((checkpoint.tokenizer_dir / "tokenizer_config.json").read_text())
    assert config["add_bos_token"] == bool(first)


def test_an_end_token_is_added_when_the_file_says_so(tmp_path):
    tokenizer = tokenizer_of(tmp_path, spm_tokenizer(add_eos_token=True))
    assert tokenizer.encode("hi").tokens == ["<s>", "▁hi", "</s>"]


def test_the_config_has_special_tokens_and_the_chat_template(tmp_path):
    folder = open_with(tmp_path, byte_tokenizer()).tokenizer_dir
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert "unk_token" not in config
    assert config["chat_template"].startswith("{% for m in messages %}")


def test_sentencepiece_joins_what_scores_highest_and_falls_back_to_bytes(tmp_path):
    tokenizer = tokenizer_of(tmp_path, spm_tokenizer())
    assert tokenizer.encode("hi", add_special_tokens=False).tokens == ["▁hi"]
    assert tokenizer.encode("hi hi é", add_special_tokens=False).tokens == [
        "▁hi",
        "▁hi",
        "▁",
        "<0xC3>",
        "<0xA9>",
    ]
    # hi (-3) is joined before ▁h (-4), so the space stays alone once ▁hi is no token.
    spec = spm_tokenizer()
    spec["ggml.tokens"][-1] = "unused"
    assert tokenizer_of(tmp_path, spec).encode("hi", add_special_tokens=False).tokens == ["▁", "hi"]


def test_sentencepiece_text_survives_with_and_without_a_leading_space(tmp_path):
    for spec in (spm_tokenizer(), spm_tokenizer(add_space_prefix=False)):
        tokenizer = tokenizer_of(tmp_path, spec)
        for text in ("hi", " hi", "hi  hi\n", "漢字 🙂"):
            assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("hi", add_special_tokens=False).tokens == ["hi"]


def test_user_defined_tokens_are_one_id_and_stay_in_the_text(tmp_path):
    tokenizer = tokenizer_of(tmp_path, spm_tokenizer(add_space_prefix=False))
    ids = tokenizer.encode("hi<sep>hi", add_special_tokens=False).ids
    assert tokenizer.id_to_token(ids[1]) == "<sep>"
    assert tokenizer.decode(ids) == "hi<sep>hi"


def test_the_directory_is_built_once_and_kept(tmp_path, cache):
    first = open_with(tmp_path, byte_tokenizer()).tokenizer_dir
    assert first.is_relative_to(cache)
    written = (first / "tokenizer.json").stat().st_mtime_ns
    assert open_with(tmp_path, byte_tokenizer()).tokenizer_dir == first
    assert (first / "tokenizer.json").stat().st_mtime_ns == written
    assert open_with(tmp_path, byte_tokenizer("smollm")).tokenizer_dir != first
    assert not [entry for entry in first.parent.iterdir() if entry.name.startswith(".")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"ggml.pre": "tekken"},
            "pre-tokenizer 'tekken' is not known; known are default, gpt-2, smollm, llama-bpe",
        ),
        ({"ggml.model": "rwkv"}, "tokenizer model 'rwkv' is not known; known are gpt2, llama"),
        ({"ggml.merges": ["h\u0120e"]}, "expected two tokens"),
        ({"ggml.merges": ["h nowhere"]}, "merges do not fit the tokens"),
        ({"ggml.eos_token_id": 9999}, "special token id 9999 is outside its 264 tokens"),
    ],
)
def test_a_tokenizer_that_cannot_be_built_says_why(tmp_path, change, message):
    checkpoint = open_with(tmp_path, byte_tokenizer() | change)
    with pytest.raises(CheckpointError, match=message):
        _ = checkpoint.tokenizer_dir


def test_sentencepiece_without_scores_is_refused(tmp_path):
    spec = spm_tokenizer()
    del spec["ggml.scores"]
    with pytest.raises(CheckpointError, match="expected 266 scores, got 0"):
        _ = open_with(tmp_path, spec).tokenizer_dir
