"""What one step does: the scheduler writes it, the runner carries it out."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from jaxserve.engine.request import Request


def tokens_of_rows(num_rows: int) -> int:
    """The places that decode rows take before prompts: a multiple of 8, where a GPU copies whole tiles."""
    return -(-num_rows // 8) * 8


def rows_before(num_tokens: int) -> int:
    """The decode rows that have room in so many places before prompts."""
    return num_tokens // 8 * 8


@dataclass(slots=True)
class Chunk:
    """`length` tokens of a prompt, from position `start`; the last chunk samples a token.

    Of a model with recurrent layers, as rows of the state pool: `state_from` is where the request stood
    before this step (-1: at its beginning), `state_kept` where a copy of the state after the chunk goes
    (-1: nowhere). A request may have several chunks in a step, which follow each other.
    """

    request: Request
    start: int
    length: int
    samples: bool
    state_from: int = -1
    state_kept: int = -1


@dataclass(slots=True)
class RankPlan:
    """One dp rank's share of a step. Empty lists mean that the rank idles.

    A decoding request takes one row for its last token, and one more for each of its drafts: guesses of
    what follows it. A row whose token was guessed wrong is computed and thrown away.
    """

    decode: list[Request] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)  # tokens that each of `decode` makes; empty: one each
    drafts: dict[Request, list[int]] = field(default_factory=dict)  # of those in `decode` that were tried
    chunks: list[Chunk] = field(default_factory=list)
    admitted: list[Request] = field(default_factory=list)  # their slot's sampling state must be set first
    table_updates: list[tuple[int, int, int]] = field(default_factory=list)  # (slot, index, page)

    @property
    def num_rows(self) -> int:
        return len(self.decode) + sum(map(len, self.drafts.values()))

    @property
    def num_samples(self) -> int:
        return sum(self.counts) or self.num_rows + sum(chunk.samples for chunk in self.chunks)

    @property
    def num_prefill_tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)

    @property
    def first_prompt_token(self) -> int:
        """Where the prompts' tokens begin among the step's; the decode rows come before."""
        return tokens_of_rows(self.num_rows)

    @property
    def num_tokens(self) -> int:
        """Of the step, those between decode rows and prompts included."""
        return self.first_prompt_token + self.num_prefill_tokens if self.chunks else self.num_rows

    @property
    def sampled(self) -> list[Request]:
        """The requests that get tokens, in the order of the step's sample rows."""
        return [*self.decode, *(chunk.request for chunk in self.chunks if chunk.samples)]

    def sample_rows(self) -> Iterator[tuple[Request, int]]:
        """(request, drafts before the row) of each row that is sampled, in order."""
        for request in self.decode:
            yield request, 0
            for number in range(len(self.drafts.get(request, ()))):
                yield request, number + 1
        for chunk in self.chunks:
            if chunk.samples:
                yield chunk.request, 0


@dataclass(slots=True)
class StepPlan:
    """One launch: a step, or `num_steps` of decode in one program, each row in its first `counts`.

    `is_constrained`: what it samples depends on tokens of the step before, by some request's grammar.
    """

    number: int
    ranks: list[RankPlan]
    num_steps: int = 1
    is_constrained: bool = False

    @property
    def has_drafts(self) -> bool:
        return any(any(rank.drafts.values()) for rank in self.ranks)
