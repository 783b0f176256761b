"""Who computes what in the next step: every rank plans its part, and gets back what was sampled.

The scheduler runs one step ahead of the device: `plan` may be called before the tokens of the last
planned step are known; `retire` hands them in afterwards, in order. It knows tokens, pages and slots,
and nothing of jax.
"""

import random
import time
from collections.abc import Callable, Sequence
from itertools import islice, repeat

from jaxserve.engine.constraints import Constraint
from jaxserve.engine.drafting import Drafter, num_right, rest_if_useless
from jaxserve.engine.plan import StepPlan
from jaxserve.engine.rank import Limits, Rank
from jaxserve.engine.request import Request
from jaxserve.messages import Finish, Generate


class Scheduler:
    """All ranks of an instance; requests come in by `submit`, tokens by `retire`."""

    def __init__(
        self,
        limits: Limits,
        num_ranks: int = 1,
        share_prefixes: bool = True,
        clock: Callable[[], float] = time.monotonic,
        seeds: random.Random | None = None,
        drafter: Drafter | None = None,
    ):
        self.limits = limits
        self.ranks = [Rank(i, limits, share_prefixes, drafter) for i in range(num_ranks)]
        self.requests: dict[str, Request] = {}
        self._clock = clock
        self._seeds = seeds or random.Random()
        self._arrivals = 0
        self._steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    def submit(self, spec: Generate, constraint: Constraint | None = None) -> Request:
        """Queue a request on a rank. The caller has checked lengths, ids and that the rid is new."""
        seed = spec.sampling.seed
        request = Request(
            spec=spec,
            rank=self._choose_rank(spec).index if spec.dp_rank is None else spec.dp_rank,
            seed=self._seeds.getrandbits(31) if seed is None else seed & 0x7FFFFFFF,
            arrival=self._arrivals,
            arrival_s=self._clock(),
            tokens=[*spec.input_ids, *spec.output_ids],
            constraint=constraint,
        )
        self._arrivals += 1
        self.requests[spec.rid] = request
        self.ranks[request.rank].queue(request)
        return request

    @property
    def drafts_next(self) -> bool:
        """Whether `plan` makes more of a step whose tokens are known than ahead of them."""
        return any(rank.drafts_next for rank in self.ranks)

    def plan(self) -> StepPlan | None:
        """The next step, or None when no rank has anything to compute."""
        now_s = self._clock()
        num_steps = self._num_steps()
        ranks = [rank.plan(now_s, num_steps) for rank in self.ranks]
        if not any(plan.decode or plan.chunks for plan in ranks):
            assert not any(plan.table_updates for plan in ranks), "pages were given to nobody"
            return None
        self._steps += 1
        is_constrained = any(r.constraint is not None for plan in ranks for r in plan.sampled)
        return StepPlan(self._steps, ranks, num_steps, is_constrained)

    def _num_steps(self) -> int:
        """Decode steps of the next launch: all that are allowed, if some row needs them all; else one."""
        most = self.limits.decode_steps
        if most == 1:
            return 1
        allowed = [rank.tokens_without_host(most) for rank in self.ranks]
        return most if max(allowed) == most and 1 not in allowed else 1

    def retire(self, plan: StepPlan, tokens: Sequence[Sequence[int]]) -> list[tuple[Request, list[int]]]:
        """Take in a step's sampled tokens, one list a rank in the order of `RankPlan.sample_rows`.

        Returns the requests that got some, with their tokens: one, and one more for each draft that
        was right. Tokens of requests that have ended meanwhile are dropped.
        """
        taken = []
        for rank, rank_plan, rank_tokens in zip(self.ranks, plan.ranks, tokens):
            rows = iter(rank_tokens)
            if rank.drafter is None:
                for request, count in zip(rank_plan.sampled, rank_plan.counts or repeat(1)):
                    sampled = list(islice(rows, count))
                    request.pending -= count
                    if request.finish is None:
                        taken.append((request, self._take(request, sampled)))
                continue
            for row, request in enumerate(rank_plan.sampled):
                drafts = rank_plan.drafts.get(request, [])
                sampled = list(islice(rows, 1 + len(drafts)))
                right = num_right(drafts, sampled)
                request.pending -= 1
                if request.finish is None:
                    taken.append((request, self._take(request, sampled[: right + 1], drafted=True)))
                    if row < len(rank_plan.decode):
                        rank.drafting.count(request, len(drafts), right)
                        if rank.drafter.rests and request in rank_plan.drafts:
                            rest_if_useless(request, right)
        return taken

    def _take(self, request: Request, tokens: Sequence[int], drafted: bool = False) -> list[int]:
        """Append tokens up to one that ends the request; returns those."""
        taken = []
        for token in tokens:
            if drafted and taken:
                request.computed += 1  # the draft before it was right, and so is its KV
            request.tokens.append(token)
            taken.append(token)
            self._finish_if_done(request, token)
            if request.finish is not None:
                break
        return taken

    def abort(self, rid: str, finish: Finish) -> Request | None:
        """End a request wherever it is; None when it is not here."""
        request = self.requests.get(rid)
        if request is not None:
            self._end(request, finish)
        return request

    def flush(self) -> int:
        """Forget every cached prefix; returns the pages freed."""
        return sum(rank.tree.clear() for rank in self.ranks)

    def check(self) -> None:
        for rank in self.ranks:
            rank.check()

    def _finish_if_done(self, request: Request, token: int) -> None:
        if token in request.spec.sampling.stop_token_ids:
            self._end(request, Finish("stop", matched=token))
        elif request.constraint is not None and (finish := request.constraint.accept(token)):
            self._end(request, finish)
        elif len(request.tokens) >= request.max_len:
            self._end(request, Finish("length", length=len(request.tokens) - request.prompt_len))

    def _end(self, request: Request, finish: Finish) -> None:
        request.finish = finish
        del self.requests[request.spec.rid]
        rank = self.ranks[request.rank]
        if request.slot >= 0:
            rank.release(request)
        else:
            rank.unqueue(request)

    def _choose_rank(self, spec: Generate) -> Rank:
        """The rank with the fewest tokens to compute before this request would be done."""
        if len(self.ranks) == 1:
            return self.ranks[0]

        known = [*spec.input_ids, *spec.output_ids]

        def cost(rank: Rank) -> tuple[int, int]:
            shared = rank.num_cached_tokens(known, spec.cache_salt)
            # A running row costs each step about as much as a few prompt tokens.
            return len(known) - shared + rank.num_queued_tokens + 16 * len(rank.running), rank.index

        return min(self.ranks, key=cost)
