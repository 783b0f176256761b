"""One request inside the engine: its tokens, its place in the pool, and how far it has come."""

from dataclasses import dataclass, field
from enum import IntEnum

from jaxserve.engine.constraints import Constraint
from jaxserve.engine.ngrams import Ngrams
from jaxserve.engine.radix import Node
from jaxserve.messages import Finish, Generate


class SamplingWork(IntEnum):
    """What choosing a row's token takes; each includes those before it."""

    GREEDY = 0
    RANDOM = 1
    FILTERS = 2  # top-k, top-p, min-p, penalties, biases, grammars
    LOGPROBS = 3


@dataclass(eq=False, slots=True)
class Request:
    """Mutable state of a sequence, owned by the scheduler.

    `tokens` are the prompt, the output that came with the request, and every sampled token that has
    been read back; `pending` more were sampled by launched steps and are still on the device.
    `computed` positions have their KV written by launched steps.
    """

    spec: Generate
    rank: int
    seed: int
    arrival: int  # order of arrival; with the priority it decides who goes first
    arrival_s: float
    tokens: list[int] = field(default_factory=list)
    constraint: Constraint | None = None
    slot: int = -1  # row of the device-side tables while running
    pages: list[int] = field(default_factory=list)
    node: Node | None = None  # locked end of the shared prefix
    num_shared: int = 0  # leading `pages` that belong to the prefix tree
    computed: int = 0
    pending: int = 0
    in_prefill: bool = False  # admitted, and its last known token is not planned yet
    state_from: int = -1  # row of the recurrent state at `computed` while in prefill; -1: all zeros
    num_known: int = 0  # leading tokens that others had too, when it was admitted
    finish: Finish | None = None
    cached_tokens: int = -1  # prompt tokens found in the cache at first admission; -1 before it
    num_retractions: int = 0
    admitted_s: float | None = None
    first_output_sent: bool = False
    ngrams: Ngrams | None = None  # made when drafts are first looked up
    guesses: list[int] = field(default_factory=list)  # the model's own, of what follows `tokens`
    num_verified: int = 0  # decode steps read back while drafts may be made
    num_drafted: int = 0
    num_accepted: int = 0  # drafts that turned out right
    misses: int = 0  # steps in a row that drafts did not help
    rests_until: int = 0  # no drafts before it has so many tokens
    max_len: int = field(init=False)  # tokens that it ends with at the latest
    has_penalty: bool = field(init=False)
    needs_bias: bool = field(init=False)  # else the slot's bias table may be an earlier request's
    needs_slot_state: bool = field(init=False)  # sampling reads what was counted or set for the slot
    sampling_work: SamplingWork = field(init=False)

    def __post_init__(self) -> None:
        s = self.spec.sampling
        self.max_len = len(self.spec.input_ids) + s.max_new_tokens
        self.needs_bias = bool(s.logit_bias or (s.min_new_tokens and s.stop_token_ids))
        self.has_penalty = bool(s.frequency_penalty or s.presence_penalty or s.repetition_penalty != 1)
        self.needs_slot_state = self.has_penalty or self.needs_bias
        narrows = s.top_p < 1 or s.top_k > 0 or s.min_p > 0
        if self.spec.return_logprob:
            self.sampling_work = SamplingWork.LOGPROBS
        elif self.needs_slot_state or self.constraint or (s.temperature > 0 and narrows):
            self.sampling_work = SamplingWork.FILTERS
        else:
            self.sampling_work = SamplingWork.RANDOM if s.temperature > 0 else SamplingWork.GREEDY

    @property
    def order(self) -> tuple[int, int]:
        """Sorts first who is served first and retracted last."""
        return -self.spec.priority, self.arrival

    @property
    def prompt_len(self) -> int:
        return len(self.spec.input_ids)

    @property
    def num_outputs(self) -> int:
        """Output tokens, those still on the device included."""
        return len(self.tokens) + self.pending - self.prompt_len

    @property
    def num_left(self) -> int:
        """Output tokens that may follow, beyond those still on the device."""
        return self.max_len - len(self.tokens) - self.pending

    @property
    def wants_decode(self) -> bool:
        """Whether a further token may be sampled; False while the last one allowed is on its way."""
        return not self.in_prefill and self.num_left > 0

    @property
    def may_draft(self) -> bool:
        """Whether guesses of its next tokens can be checked all at once, and are worth it now.

        Penalties count each token before the next one is sampled, and a grammar follows it, so a step
        samples one of them.
        """
        return not (self.has_penalty or self.constraint) and len(self.tokens) >= self.rests_until

    @property
    def has_mask(self) -> bool:
        """Whether its next token has to be one that its grammar allows."""
        return self.constraint is not None and self.constraint.has_begun

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether prompt tokens are to be scored; a resumed request has sent them already."""
        return self.spec.return_logprob and self.spec.logprob_start_len >= 0 and not self.first_output_sent

    @property
    def reuse_limit(self) -> int:
        """Leading tokens that may come from the cache: not the last, nor any that scores the one after it."""
        limit = len(self.tokens) - 1
        if self.wants_prompt_logprobs:
            limit = min(limit, max(self.spec.logprob_start_len - 1, 0))
        return limit
