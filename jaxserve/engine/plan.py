"""What one step does: the scheduler writes it, the runner carries it out."""

from dataclasses import dataclass, field

from jaxserve.engine.request import Request


@dataclass(slots=True)
class Chunk:
    """`length` tokens of a prompt, from position `start`; the last chunk samples a token."""

    request: Request
    start: int
    length: int
    samples: bool


@dataclass(slots=True)
class RankPlan:
    """One dp rank's share of a step. Empty lists mean that the rank idles."""

    decode: list[Request] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    admitted: list[Request] = field(default_factory=list)  # their slot's sampling state must be set first
    table_updates: list[tuple[int, int, int]] = field(default_factory=list)  # (slot, index, page)

    @property
    def num_prefill_tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)

    @property
    def sampled(self) -> list[Request]:
        """The requests that get a token, in the order of the step's sample rows."""
        return [*self.decode, *(chunk.request for chunk in self.chunks if chunk.samples)]


@dataclass(slots=True)
class StepPlan:
    number: int
    ranks: list[RankPlan]
