"""Requests whose output has to follow a grammar: until they can start, and what each may say next.

A grammar is made ready in a thread, while others run. Its state is advanced by each token that is read
back, so a step in which such a request takes part samples only once the step before was read: the masks
are made while the device computes the step's logits (see `EngineLoop`).
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np

from jaxserve.messages import Finish, Generate
from jaxserve.text.grammar import GrammarError
from jaxserve.text.matcher import Matcher, Vocabulary

logger = logging.getLogger(__name__)

MASK_BITS = 32  # tokens of one word of a mask
NUM_THREADS = 4  # that make grammars ready: most take a millisecond


class Constraint:
    """One request's grammar and how far its output has come.

    Args:
        make: a matcher at the grammar's beginning.
        begins_after: token ids behind which the grammar begins; until then anything goes.
        opening: where the output begins with another token than this, the grammar begins with it.
        output_ids: the output so far. Raises GrammarError where the grammar does not allow it.
    """

    def __init__(
        self,
        make: Callable[[], Matcher],
        begins_after: Sequence[int],
        opening: int | None = None,
        output_ids: Sequence[int] = (),
    ):
        self._make = make
        self.matcher = make()
        self._taken: list[int] = []  # tokens, by the matcher
        self.opening = opening  # None once the output has begun
        self._begins_after = list(begins_after)
        self._tail: list[int] = []  # of the output, while the grammar has not begun
        self.has_begun = not begins_after or opening is not None
        self.is_stuck = False  # no token may come next
        for token in output_ids:
            finish = self.accept(token)
            if finish is not None and finish.type == "abort":
                raise GrammarError("output_ids do not follow the grammar")

    def accept(self, token: int) -> Finish | None:
        """Take in a token of the output; why the output ends with it, if it does."""
        if self.opening is not None:
            self.has_begun = token != self.opening
            self.opening = None
        if not self.has_begun:
            self._tail = [*self._tail, token][-len(self._begins_after) :]
            self.has_begun = self._tail == self._begins_after
            return None
        if not self.matcher.consume(token) and not (self.renew() and self.matcher.consume(token)):
            return Finish("abort", message=f"the grammar: {self.error}", status_code=400)
        self._taken.append(token)
        if not self.matcher.is_complete:
            return None
        return Finish("stop", matched=token if self.matcher.has_ended else None)

    def renew(self) -> bool:
        """Go on with a matcher of another family, where this one failed by what others have used up."""
        family, self.matcher.family.spent = self.matcher.family, True
        if family.num_joined > 1:
            self.matcher = self._make()
            return all(self.matcher.consume(token) for token in self._taken)
        return False

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow."""
        return self.has_begun and self.matcher.is_complete

    @property
    def error(self) -> str:
        """Why the output cannot go on; empty while it can."""
        return "no token of this model can follow" if self.is_stuck else self.matcher.error


class Constraints:
    """The grammars of an engine's requests.

    Args:
        make_vocabulary: called once, in a thread; its ValueError is every request's refusal.
    """

    def __init__(self, make_vocabulary: Callable[[], Vocabulary]):
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="grammar")
        self._vocabulary = self._pool.submit(make_vocabulary)
        self._vocabulary.add_done_callback(_warn)
        self._waiting: dict[str, tuple[Generate, Future[Constraint]]] = {}

    # ---- until a request can start ----

    @property
    def waiting(self) -> Sequence[str]:
        """The requests whose grammar is not ready, by rid."""
        return list(self._waiting)

    def prepare(self, spec: Generate) -> None:
        """Make a request's grammar ready; `take_ready` hands it out."""
        self._waiting[spec.rid] = spec, self._pool.submit(self._make, spec)

    def _make(self, spec: Generate) -> Constraint:
        sampling = spec.sampling
        make = partial(self._vocabulary.result().matcher, sampling.grammar)
        return Constraint(make, sampling.grammar_after, sampling.grammar_opening, spec.output_ids)

    def take_ready(self) -> list[tuple[Generate, Constraint | str]]:
        """The requests whose grammar is ready, or cannot be and why, in the order in which they came."""
        ready = [(spec, made) for spec, made in self._waiting.values() if made.done()]
        out: list[tuple[Generate, Constraint | str]] = []
        for spec, made in ready:
            del self._waiting[spec.rid]
            error = made.exception()
            if error is None:
                out.append((spec, made.result()))
            else:
                if not isinstance(error, ValueError):
                    logger.error("a grammar could not be made ready", exc_info=error)
                out.append((spec, f"the grammar cannot be used: {error}"))
        return out

    def drop(self, rid: str) -> Generate | None:
        """Forget a request that waits; None when it does not."""
        spec, made = self._waiting.pop(rid, (None, None))
        if made is not None:
            made.cancel()
        return spec

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    # ---- in a step ----

    def fill(self, masks_RW: np.ndarray, constraints: Sequence[Constraint]) -> None:
        """See `Vocabulary.fill`; each of them has begun. Those that cannot go on have an `error` then."""
        vocabulary = self._vocabulary.result()
        vocabulary.fill(masks_RW, [constraint.matcher for constraint in constraints])
        for row, constraint in enumerate(constraints):
            if constraint.error and constraint.renew():
                vocabulary.fill(masks_RW[row : row + 1], [constraint.matcher])
        for constraint, mask_W in zip(constraints, masks_RW.view(np.uint32)):
            if (token := constraint.opening) is not None:
                mask_W[token // MASK_BITS] |= np.uint32(1 << token % MASK_BITS)
        for constraint, any_token in zip(constraints, masks_RW.any(axis=1).tolist()):
            constraint.is_stuck = not any_token


def _warn(vocabulary: Future[Vocabulary]) -> None:
    if not vocabulary.cancelled() and (error := vocabulary.exception()):
        logger.warning("requests with a grammar will be refused: %s", error)
