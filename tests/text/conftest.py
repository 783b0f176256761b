"""Tokenizers of the tests, as the server loads them."""

import pytest
import tiny_tokenizer

from jaxserve.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    return Tokenizer(tiny_tokenizer.byte_level(), {"bos_token": "<s>", "eos_token": "</s>"})


@pytest.fixture(scope="session")
def sentencepiece() -> Tokenizer:
    return Tokenizer(tiny_tokenizer.sentencepiece(), {"bos_token": "<s>", "eos_token": "</s>"})


@pytest.fixture(scope="session")
def wordpiece() -> Tokenizer:
    return Tokenizer(tiny_tokenizer.wordpiece())
