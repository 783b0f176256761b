"""How far an output has come in its grammar, and which tokens may follow.

Owns the vocabulary as `llguidance` sees it: the bytes of each token, and which end a sequence. Grammars come
from `jaxserve.text.grammar`. Knows nothing of requests or of the engine.
"""

from collections.abc import Collection, Sequence
from functools import partial

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLTokenizer

from jaxserve.text.deep_stack import run_deep
from jaxserve.text.grammar import LIMITS, GrammarError
from jaxserve.text.tokenizer import Tokenizer


class Vocabulary:
    """A model's tokens, for grammars. Safe to share between threads.

    Args:
        size: ids that the model may choose; those beyond the tokenizer's are never allowed.
        eos_token_ids: what may end an output where its grammar may end; others than the tokenizer's do not.

    Raises:
        GrammarError: the tokenizer is of a kind whose tokens do not stand for bytes, is wider than the model,
            or has no token that ends a sequence.
    """

    def __init__(self, tokenizer: Tokenizer, size: int, eos_token_ids: Collection[int]):
        eos = sorted(t for t in eos_token_ids if tokenizer.fast.id_to_token(t) is not None)
        if not eos:
            raise GrammarError("the tokenizer has no token that ends a sequence")
        try:  # holds the interpreter for 0.2 s of 50,000 tokens
            self._tokens = LLTokenizer(tokenizer.fast.to_str(), n_vocab=size, eos_token=eos)
        except ValueError as error:
            raise GrammarError(f"the tokenizer: {error}") from error
        self._executor = LLExecutor()

    def matcher(self, grammar: str) -> LLMatcher:
        """At the grammar's beginning; 0.5 to 15 ms, without the interpreter. Raises GrammarError.

        Each is made anew: copies of one share a lock, and masks of 64 copies took as long as one by one.
        """
        matcher = run_deep(partial(LLMatcher, self._tokens, grammar, log_level=0, limits=LIMITS))
        if matcher.is_error():
            raise GrammarError(matcher.get_error().partition("\n")[0])
        return matcher

    def fill(self, masks_RW: np.ndarray, matchers: Sequence[LLMatcher]) -> None:
        """What may follow: bit v of row r is set where token v may follow in `matchers[r]`.

        masks_RW: [R, ceil(size / 32)] int32, contiguous. A matcher with an error allows only the end.
        """
        places = [(matcher, row) for row, matcher in enumerate(matchers)]
        row_bytes = masks_RW.shape[1] * masks_RW.itemsize
        self._executor.unsafe_compute_mask_ptr(places, masks_RW.ctypes.data, row_bytes, len(masks_RW))
