"""Incremental decoding: tokens in, final text out.

Text once given is never taken back: bytes of an unfinished character are held until the tokens
that complete it arrive. Work is proportional to the new tokens.
"""

import codecs
from collections.abc import Iterable, Sequence

from jaxserve.text.tokenizer import Tokenizer

CONTEXT_TOKENS = 5  # of the prompt; enough for decoders that look at what precedes a token
WINDOW_TOKENS = 16  # a UTF-8 character has at most 4 bytes, so 16 tokens without one are not UTF-8


class Detokenizer:
    """The text of one sequence's output, for tokenizers whose tokens stand for fixed bytes."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._bytes_of = tokenizer.token_bytes
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_ids: Iterable[int]) -> str:
        """The text that became final."""
        skipped, bytes_of = self._skipped, self._bytes_of
        return self._utf8.decode(b"".join([bytes_of(t) for t in token_ids if t not in skipped]))

    @property
    def holds(self) -> bool:
        """Whether a token's text is not out yet, or not all of it."""
        return bool(self._utf8.getstate()[0])

    def flush(self) -> str:
        """What is still held, with U+FFFD for an unfinished character."""
        return self._utf8.decode(b"", final=True)


class WindowDetokenizer:
    """The same for any other decoder: decodes a short window of tokens with and without the new ones.

    `context` are the last tokens of the prompt, so that spaces at the border come out right.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True, context: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window = list(context[-CONTEXT_TOKENS:])
        self._read = len(self._window)  # tokens of the window whose text is out
        self._seen = self._decode(self._window)

    def feed(self, token_ids: Iterable[int]) -> str:
        return "".join([self._feed_one(t) for t in token_ids])

    @property
    def holds(self) -> bool:
        return self._read < len(self._window)

    def flush(self) -> str:
        return self._decode(self._window)[len(self._seen) :]

    def _feed_one(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith("\ufffd") and len(self._window) - self._read < WINDOW_TOKENS:
            return ""
        new = text[len(self._seen) :]
        self._window = self._window[self._read :]  # the tokens just given out are the next context
        self._read = len(self._window)
        self._seen = self._decode(self._window)
        return new

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip)


def make_detokenizer(
    tokenizer: Tokenizer, skip_special_tokens: bool = True, context: Sequence[int] = ()
) -> Detokenizer | WindowDetokenizer:
    """The right one for the tokenizer. `context`: the prompt, or its end."""
    if tokenizer.decoder_kind == "other":
        return WindowDetokenizer(tokenizer, skip_special_tokens, context)
    return Detokenizer(tokenizer, skip_special_tokens)
