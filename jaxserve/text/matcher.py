"""How far an output has come in its grammar, and which tokens may follow.

Owns the vocabulary as `llguidance` sees it: the bytes of each token, and which end a sequence. Grammars come
from `jaxserve.text.grammar`. Knows nothing of requests or of the engine.
"""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Collection, Sequence
from functools import partial

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLTokenizer

from jaxserve.text.deep_stack import run_deep
from jaxserve.text.grammar import LIMITS, GrammarError
from jaxserve.text.tokenizer import Tokenizer

NUM_FAMILIES = 16  # of one grammar, about one for each thread that makes masks
NUM_KEPT = 128  # families; one takes 0.2 to 1 MB, and 40 at most
MOST_MEMBERS = 64  # ever, of a family: what its lexer has learnt grows with each, up to a limit


class Family:
    """Matchers of one grammar that share what its lexer has learnt, and a lock with it.

    What it has learnt has a limit, at which they all fail: a family that has met it is `spent`.
    """

    def __init__(self, first: LLMatcher):
        self._first = first
        self._members: weakref.WeakSet[Matcher] = weakref.WeakSet()
        self.num_joined = 0
        self.spent = False

    def __len__(self) -> int:
        """Members in use."""
        return len(self._members)

    def join(self) -> "Matcher":
        """A new one, at the grammar's beginning."""
        member = Matcher(self._first.deep_copy(), self)
        self._members.add(member)
        self.num_joined += 1
        return member


class Matcher:
    """How far one output has come."""

    def __init__(self, native: LLMatcher, family: Family):
        self.native, self.family = native, family

    def consume(self, token: int) -> bool:
        """Take in the output's next token; False where the grammar does not allow it."""
        return self.native.consume_token(token)

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow."""
        return self.native.is_stopped()

    @property
    def has_ended(self) -> bool:
        """Whether the last token was one that ends a sequence."""
        return self.native.stop_reason() == "EndOfSentence"

    @property
    def error(self) -> str:
        """Why it cannot go on, in one line; empty while it can."""
        return self.native.get_error().partition("\n")[0]


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
        self._kept: OrderedDict[tuple[str, int], Family] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, grammar: str) -> Matcher:
        """At the grammar's beginning. Raises GrammarError.

        Of the family with the fewest members in use. A new family takes 0.5 to 15 ms (of hundreds of
        properties up to 0.5 s), without the interpreter, and some 10 ms more in masks until its lexer is
        warm; but members wait for each other, and masks of 64 of one take as long as one by one.
        """
        with self._lock:
            families = [self._kept.get((grammar, i)) for i in range(NUM_FAMILIES)]
            number = min(range(NUM_FAMILIES), key=lambda i: len(families[i] or ()))
            family = families[number]
            if family is not None and family.num_joined < MOST_MEMBERS and not family.spent:
                self._kept.move_to_end((grammar, number))
                return family.join()
        first = run_deep(partial(LLMatcher, self._tokens, grammar, log_level=0, limits=LIMITS))
        if first.is_error():
            raise GrammarError(first.get_error().partition("\n")[0])
        with self._lock:
            family = self._kept[grammar, number] = Family(first)
            if len(self._kept) > NUM_KEPT:
                self._kept.popitem(last=False)
            return family.join()

    def fill(self, masks_RW: np.ndarray, matchers: Sequence[Matcher]) -> None:
        """What may follow: bit v of row r is set where token v may follow in `matchers[r]`.

        masks_RW: [R, ceil(size / 32)] int32, contiguous. A matcher with an error allows only the end.
        """
        rows = sorted(range(len(matchers)), key=lambda row: id(matchers[row].family))
        places = [(matchers[row].native, row) for row in rows]  # a thread makes masks that are neighbours
        row_bytes = masks_RW.shape[1] * masks_RW.itemsize
        self._executor.unsafe_compute_mask_ptr(places, masks_RW.ctypes.data, row_bytes, len(masks_RW))
