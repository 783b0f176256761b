"""Encoding and decoding as the checkpoint's files say."""

import pytest
import tiny_tokenizer

from jaxserve.text.tokenizer import Tokenizer, TokenizerError


def test_each_decoder_is_recognised(byte_level, sentencepiece, wordpiece):
    assert byte_level.decoder_kind == "byte_level"
    assert sentencepiece.decoder_kind == "sentencepiece"
    assert wordpiece.decoder_kind == "other"


def test_files_of_a_directory_give_special_tokens(tmp_path):
    tokenizer = Tokenizer.from_dir(tiny_tokenizer.write(tmp_path))
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (0, frozenset({1}))
    assert tokenizer.special_ids == {0, 1, 2, 3}


def test_special_tokens_of_older_files_are_in_a_map_of_their_own(tmp_path):
    tiny_tokenizer.write(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>", "unk_token": null}')
    named = '{"bos_token": {"content": "<s>"}, "eos_token": "<other>", "unk_token": "<unk>"}'
    (tmp_path / "special_tokens_map.json").write_text(named)
    assert Tokenizer.from_dir(tmp_path).special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


def test_missing_tokenizer_json_is_named(tmp_path):
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is missing"):
        Tokenizer.from_dir(tmp_path)


def test_broken_files_are_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.from_dir(tmp_path)
    tiny_tokenizer.write(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json is not a JSON object"):
        Tokenizer.from_dir(tmp_path)


def test_missing_tokenizer_config_is_allowed(tmp_path):
    tiny_tokenizer.write(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.from_dir(tmp_path).eos_token_ids == frozenset()


def test_post_processor_adds_bos_only_when_special_tokens_are_wanted(sentencepiece):
    assert sentencepiece.encode("the")[0] == 1
    assert sentencepiece.encode("the", add_special_tokens=False)[0] != 1


def test_add_bos_token_of_the_config_wins_over_the_post_processor():
    without = Tokenizer(tiny_tokenizer.sentencepiece(), {"bos_token": "<s>", "add_bos_token": False})
    assert 1 not in without.encode("the")
    plain = tiny_tokenizer.byte_level()
    ids = plain.encode("the").ids
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "add_eos_token": True}
    added = Tokenizer(plain, config)
    assert added.encode("the") == [0, *ids, 1]
    assert added.encode_batch(["the", ""]) == [[0, *ids, 1], [0, 1]]
    assert added.encode("the", add_special_tokens=False) == ids


def test_batch_equals_one_by_one(sentencepiece):
    texts = ["the", "", "a b", "é"]
    assert sentencepiece.encode_batch(texts) == [sentencepiece.encode(t) for t in texts]
    assert sentencepiece.encode_batch(texts, False) == [sentencepiece.encode(t, False) for t in texts]


def test_special_tokens_are_skipped_on_demand(byte_level):
    ids = byte_level.encode("hello</s>")
    assert ids[-1] == 1
    assert byte_level.decode(ids) == "hello"
    assert byte_level.decode(ids, skip_special_tokens=False) == "hello</s>"


def test_token_bytes_are_the_bytes_of_the_text(byte_level, sentencepiece):
    assert b"".join(byte_level.token_bytes(t) for t in byte_level.encode("a é€😀")) == "a é€😀".encode()
    ids = sentencepiece.encode("the é", add_special_tokens=False)
    assert b"".join(sentencepiece.token_bytes(t) for t in ids) == " the é".encode()


def test_unknown_id_has_no_bytes(byte_level, sentencepiece, wordpiece):
    assert [t.token_bytes(10_000) for t in (byte_level, sentencepiece, wordpiece)] == [b"", b"", b""]


def test_part_of_a_character_shows_as_replacement(byte_level):
    first = byte_level.encode("é")[0]
    assert byte_level.token_text(first) == "\ufffd"
