"""Incremental decoding gives the whole decoding, and never takes text back."""

import pytest
import tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer

from jaxserve.text.detokenizer import make_detokenizer
from jaxserve.text.tokenizer import Tokenizer

BYTE_LEVEL = Tokenizer(tiny_tokenizer.byte_level())
SENTENCEPIECE = Tokenizer(tiny_tokenizer.sentencepiece())
WORDPIECE = Tokenizer(tiny_tokenizer.wordpiece())
# Surrogates are no characters: neither JSON nor a tokenizer can carry them.
TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)


def pieces_of(tokenizer: Tokenizer, token_ids: list[int], context: list[int] = (), **rules) -> list[str]:
    detokenizer = make_detokenizer(tokenizer, context=context, **rules)
    return [*(detokenizer.feed([t]) for t in token_ids), detokenizer.flush()]


@given(TEXTS)
def test_byte_level_pieces_join_to_the_text(text):
    ids = BYTE_LEVEL.encode(text)
    pieces = pieces_of(BYTE_LEVEL, ids, skip_special_tokens=False)
    assert "".join(pieces) == BYTE_LEVEL.decode(ids, skip_special_tokens=False) == text


@given(st.lists(st.integers(0, 280), max_size=60), st.booleans())
def test_any_token_ids_give_what_the_tokenizer_decodes(ids, skip):
    pieces = pieces_of(BYTE_LEVEL, ids, skip_special_tokens=skip)
    assert "".join(pieces) == BYTE_LEVEL.decode(ids, skip_special_tokens=skip)


@given(TEXTS)
def test_replacement_character_appears_only_where_the_text_has_one(text):
    pieces = pieces_of(BYTE_LEVEL, BYTE_LEVEL.encode(text), skip_special_tokens=False)
    assert sum(p.count("\ufffd") for p in pieces) == text.count("\ufffd")


@given(TEXTS, st.integers(1, 7))
def test_several_tokens_a_step_change_nothing(text, step):
    ids = BYTE_LEVEL.encode(text)
    detokenizer = make_detokenizer(BYTE_LEVEL, skip_special_tokens=False)
    pieces = [detokenizer.feed(ids[i : i + step]) for i in range(0, len(ids), step)]
    assert "".join(pieces) + detokenizer.flush() == text


@given(TEXTS)
def test_sentencepiece_output_continues_the_prompt(text):
    prompt = SENTENCEPIECE.encode("the", add_special_tokens=False)
    ids = SENTENCEPIECE.encode(text, add_special_tokens=False)
    whole = SENTENCEPIECE.decode(prompt + ids, skip_special_tokens=False)
    pieces = pieces_of(SENTENCEPIECE, ids, prompt, skip_special_tokens=False)
    assert "the" + "".join(pieces) == whole


@given(st.lists(st.sampled_from([1, 2, 3, 4, 5, 6]), min_size=1, max_size=60))
def test_window_gives_what_the_whole_gives(ids):
    prompt = WORDPIECE.encode("and hello", add_special_tokens=False)
    whole = WORDPIECE.decode(prompt + ids)
    pieces = pieces_of(WORDPIECE, ids, prompt)
    assert "and hello" + "".join(pieces) == whole


@given(TEXTS)
def test_window_holds_unfinished_characters_back(text):
    windowed = Tokenizer(FastTokenizer.from_str(BYTE_LEVEL.fast.to_str()))
    windowed.decoder_kind = "other"
    ids = BYTE_LEVEL.encode(text)
    assert "".join(pieces_of(windowed, ids, skip_special_tokens=False)) == text


def test_euro_sign_comes_with_its_last_byte():
    assert pieces_of(BYTE_LEVEL, BYTE_LEVEL.encode("€")) == ["", "", "€", ""]


def test_unfinished_character_is_flushed_as_one_replacement():
    ids = BYTE_LEVEL.encode("a€")[:-1]
    assert pieces_of(BYTE_LEVEL, ids) == ["a", "", "", "\ufffd"]


def test_window_never_grows_on_bytes_that_are_no_text():
    windowed = Tokenizer(FastTokenizer.from_str(BYTE_LEVEL.fast.to_str()))
    windowed.decoder_kind = "other"
    stray = BYTE_LEVEL.encode("€")[1]
    detokenizer = make_detokenizer(windowed)
    lengths = []
    for _ in range(100):
        detokenizer.feed([stray])
        lengths.append(len(detokenizer._window))
    assert max(lengths) <= 32


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_special_tokens_are_left_out(kind, request):
    tokenizer = request.getfixturevalue(kind)
    eos = tokenizer.eos_token_id
    letter = tokenizer.encode("a", add_special_tokens=False)[-1]
    assert pieces_of(tokenizer, [letter, eos, letter]) == ["a", "", "a", ""]
    assert pieces_of(tokenizer, [letter, eos], skip_special_tokens=False) == ["a", "</s>", ""]
