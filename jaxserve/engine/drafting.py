"""Speculative decoding on the host: who guesses a sequence's next tokens, and how good the guesses are.

A step checks a request's drafts by sampling at each of them with the randomness of its position. A
draft is right when it is the token that was sampled before it, so the tokens are those of one at a
time, greedy or random; a wrong one costs a row of the step, and nothing is undone: its key and value
are overwritten by the token that comes instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from jaxserve.engine.ngrams import Ngrams
from jaxserve.engine.request import Request

MOST_MISSES = 4  # steps in a row without a right draft, after which a request goes on without
REST_TOKENS = 16  # for so long


class Drafter(Protocol):
    """Guesses tokens.

    `max_drafts` are those of one request and step, `max_rows` the rows of a step and rank, drafts
    included, beyond which there are none. `rests`: requests that it does not help may go without, ahead
    of the device; else drafts are made of every step's results, so each step waits for the one before.
    """

    @property
    def max_drafts(self) -> int: ...

    @property
    def max_rows(self) -> int: ...

    @property
    def rests(self) -> bool: ...

    def propose(self, request: Request, count: int) -> list[int]:
        """At most `count` (1 or more) tokens that may follow the request's known ones."""
        ...


@dataclass(frozen=True)
class NgramDrafter:
    """Drafts from the request's own tokens; see `jaxserve.engine.ngrams`."""

    max_drafts: int
    max_rows: int
    shortest: int
    longest: int
    rests: bool = True  # finding nothing makes the step wait for the one before all the same

    def propose(self, request: Request, count: int) -> list[int]:
        if request.ngrams is None:
            request.ngrams = Ngrams(self.shortest, self.longest)
        return request.ngrams.propose(request.tokens, count)


@dataclass(frozen=True)
class NextnDrafter:
    """Hands out what the model's own layer guessed after the last step; see `jaxserve.engine.nextn`."""

    max_drafts: int
    max_rows: int
    rests: bool = False

    def propose(self, request: Request, count: int) -> list[int]:
        return request.guesses[:count]


def num_right(drafts: Sequence[int], sampled: Sequence[int]) -> int:
    """How many of the drafts were right; `sampled` are the tokens before and after each of them."""
    for number, (draft, token) in enumerate(zip(drafts, sampled)):
        if draft != token:
            return number
    return len(drafts)


@dataclass(slots=True)
class Drafting:
    """What became of one rank's drafts since the start."""

    steps: int = 0  # of a request: one for each decode row that was read back
    drafted: int = 0
    accepted: int = 0

    def count(self, request: Request, drafted: int, accepted: int) -> None:
        """A decode step of a request is known."""
        self.steps += 1
        self.drafted += drafted
        self.accepted += accepted
        request.num_verified += 1
        request.num_drafted += drafted
        request.num_accepted += accepted


def rest_if_useless(request: Request, accepted: int) -> None:
    """Let a request go on without drafts for a while when they keep being wrong or missing."""
    request.misses = 0 if accepted else request.misses + 1
    if request.misses >= MOST_MISSES:
        request.misses -= 1  # after the rest one more miss is enough
        request.rests_until = len(request.tokens) + REST_TOKENS
