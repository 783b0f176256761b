"""Which tokens may follow: exactly those that a grammar allows, in every kind of tokenizer."""

import random
import re

import numpy as np
import pytest
import tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

from jaxserve.text.grammar import GrammarError
from jaxserve.text.matcher import NUM_FAMILIES, Vocabulary
from jaxserve.text.tokenizer import Tokenizer

EOS = 1
SIZE = 320  # wider than the tokenizer, as models are
DIGITS = LLMatcher.grammar_from_regex("(yes|no)[0-9]{3}")
LETTERS = LLMatcher.grammar_from_regex("[a-f]{3,12}")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.from_dir(tiny_tokenizer.write(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def vocabulary(tokenizer):
    return Vocabulary(tokenizer, SIZE, {EOS})


def allowed(vocabulary, *matchers) -> list[list[int]]:
    masks = np.full((len(matchers), SIZE // 32), -1, np.int32)
    vocabulary.fill(masks, matchers)
    bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")
    return [np.flatnonzero(row).tolist() for row in bits]


def draw(vocabulary, tokenizer, grammar: str, seed: int, most: int = 200) -> bytes | None:
    """An output whose tokens are any that may follow; None when it does not end."""
    matcher, chosen, text = vocabulary.matcher(grammar), random.Random(seed), b""
    for _ in range(most):
        [tokens] = allowed(vocabulary, matcher)
        token = chosen.choice(tokens)
        assert matcher.consume(token)
        if token == EOS:
            return text
        text += tokenizer.token_bytes(token)
        if matcher.is_complete:
            return text
    return None


def test_masks_allow_exactly_what_may_follow(vocabulary, tokenizer):
    made = [vocabulary.matcher(g) for g in (DIGITS, LETTERS, DIGITS)]
    for token in tokenizer.encode("no", add_special_tokens=False):
        assert made[2].consume(token)
    letters = [sorted(map(tokenizer.token_text, row)) for row in allowed(vocabulary, *made)]
    assert letters == [["n", "y"], list("abcdef"), list("0123456789")]


def test_tokens_of_several_characters_may_follow_too(vocabulary, tokenizer):
    [row] = allowed(vocabulary, vocabulary.matcher(LLMatcher.grammar_from_regex("(the|stop) a")))
    assert [tokenizer.token_text(token) for token in row] == ["s", "t", "st", "sto", "stop", "th", "the"]


def test_special_tokens_are_no_text(vocabulary, tokenizer):
    [row] = allowed(vocabulary, vocabulary.matcher(LLMatcher.grammar_from_regex("(?s:.+)")))
    assert not tokenizer.special_ids & {*row} and len(row) > 190


PIECES = st.sampled_from(["a", "hello", "[a-d]", "[^x]", "world ", "(ab|the)", "[0-9]", "é", "日"])
REGEXES = st.lists(st.tuples(PIECES, st.sampled_from(["", "?", "{2}", "{0,3}", "+"])), min_size=1, max_size=5)


@given(REGEXES, st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_what_is_drawn_by_the_masks_matches(vocabulary, tokenizer, parts, seed):
    regex = "".join(f"({piece}){times}" for piece, times in parts)
    text = draw(vocabulary, tokenizer, LLMatcher.grammar_from_regex(regex), seed)
    if text is not None:  # characters that have no token are made of bytes
        assert re.fullmatch(regex, text.decode(), re.DOTALL)


@pytest.mark.parametrize("kind", [tiny_tokenizer.byte_level, tiny_tokenizer.sentencepiece])
def test_every_kind_of_tokenizer_has_masks(kind, tmp_path):
    tokenizer = Tokenizer.from_dir(tiny_tokenizer.write(tmp_path, kind()))
    vocabulary = Vocabulary(tokenizer, SIZE, {2 if kind is tiny_tokenizer.sentencepiece else EOS})
    said = draw(vocabulary, tokenizer, LLMatcher.grammar_from_regex("the [a-c]{2}é"), 3)
    assert said is not None and re.fullmatch("the [a-c]{2}é", said.decode())


def test_vocabulary_without_an_end_is_refused(tokenizer):
    with pytest.raises(GrammarError, match="has no token that ends a sequence"):
        Vocabulary(tokenizer, SIZE, {999})


def test_grammar_that_cannot_be_read_is_refused(vocabulary):
    with pytest.raises(GrammarError, match="Invalid type: zzz"):
        vocabulary.matcher('{"grammars": [{"json_schema": {"type": "zzz"}}]}')


def test_matchers_in_use_at_once_are_of_different_families_and_later_ones_of_those(tokenizer, monkeypatch):
    vocabulary = Vocabulary(tokenizer, SIZE, {EOS})
    together = [vocabulary.matcher(DIGITS) for _ in range(NUM_FAMILIES)]
    assert len({id(matcher.family) for matcher in together}) == NUM_FAMILIES
    more = [vocabulary.matcher(DIGITS) for _ in range(NUM_FAMILIES)]
    assert {id(m.family) for m in more} == {id(m.family) for m in together}
    first = together[0].family
    del together, more
    assert vocabulary.matcher(DIGITS).family is first
    assert vocabulary.matcher(LETTERS).family is not first


def test_only_the_latest_families_are_kept(tokenizer, monkeypatch):
    monkeypatch.setattr("jaxserve.text.matcher.NUM_KEPT", 2)
    vocabulary = Vocabulary(tokenizer, SIZE, {EOS})
    for letter in "abac":
        vocabulary.matcher(LLMatcher.grammar_from_regex(letter))
    kept = [LLMatcher.grammar_from_regex(letter) for letter in "ac"]
    assert [grammar for grammar, _ in vocabulary._kept] == kept


@pytest.mark.parametrize(
    "kind, size, reason", [("wordpiece", 320, "WordPiece"), ("byte_level", 64, "64 vs 277")]
)
def test_tokenizer_that_cannot_be_used_is_refused(tmp_path, kind, size, reason):
    tokenizer = Tokenizer.from_dir(tiny_tokenizer.write(tmp_path, getattr(tiny_tokenizer, kind)()))
    with pytest.raises(GrammarError, match=reason):
        Vocabulary(tokenizer, size, {EOS})
