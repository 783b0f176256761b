"""One data-parallel rank's side of scheduling: its pool, prefix tree, queue and running batch.

Admission, chunked prefill, growth, retraction and release; `jaxserve.engine.scheduler` asks every rank
for its part of a step. Knows tokens, pages and slots, and nothing of jax.

Why it cannot deadlock: a request is admitted only when pages for all its known tokens are there; when
a running request needs one more page and none can be evicted, the last in order is retracted; so the
first in order always goes on, and no request may be longer than the pool.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from operator import attrgetter

from jaxserve.engine.drafting import Drafter, Drafting
from jaxserve.engine.pages import PagePool
from jaxserve.engine.plan import Chunk, RankPlan, rows_before, tokens_of_rows
from jaxserve.engine.radix import Node, RadixTree
from jaxserve.engine.request import Request, SamplingWork
from jaxserve.engine.states import Checkpoints

ORDER = attrgetter("order")
GROWTH_TOKENS = 64  # how far ahead admission leaves room for each running request to grow


@dataclass(frozen=True)
class Limits:
    """Sizes of one dp rank."""

    num_pages: int
    page_size: int
    num_slots: int  # rows of the running batch
    step_tokens: int  # of one step, rows and prompts together
    prefill_tokens: int  # of prompts in one step
    prefill_chunks: int  # different prompts in one step
    num_checkpoints: int | None = None  # states that can be kept; None: the model has no recurrent state
    decode_steps: int = 1  # in one launch, while there is nothing but decode to do


class Rank:
    """One data-parallel rank: its pool, prefix tree, queue and running batch."""

    def __init__(self, index: int, limits: Limits, share_prefixes: bool, drafter: Drafter | None = None):
        self.index = index
        self.limits = limits
        self.drafter = drafter
        self.drafting = Drafting()
        self.pool = PagePool(limits.num_pages)
        self.checkpoints: Checkpoints | None = None
        if limits.num_checkpoints is not None:
            self.checkpoints = Checkpoints(limits.num_slots, limits.num_checkpoints)
        drop_state = self.checkpoints and self.checkpoints.forget
        self.tree = RadixTree(limits.page_size, self.pool, share_prefixes, drop_state)
        self.waiting: list[Request] = []  # by order
        self.running: list[Request] = []  # by order
        self.free_slots = list(range(limits.num_slots - 1, -1, -1))
        self.updates: list[tuple[int, int, int]] = []

    # ---- waiting ----

    def queue(self, request: Request) -> None:
        insort(self.waiting, request, key=ORDER)

    def unqueue(self, request: Request) -> None:
        place = bisect_left(self.waiting, request.order, key=ORDER)
        assert self.waiting[place] is request
        del self.waiting[place]

    # ---- a step ----

    def tokens_without_host(self, most: int) -> int:
        """Decode steps, up to `most`, in which some row has a token to make and none needs the host between.

        0 when nobody decodes; 1 when somebody waits who can be let in, a prompt is to be computed, a token
        needs more than a temperature, or pages are short.
        """
        longest, needed = 0, 0
        for request in self.running:
            if request.in_prefill or request.sampling_work > SamplingWork.RANDOM:
                return 1
            count = min(most, request.num_left)
            longest = max(longest, count)
            needed += max(0, self._pages_for(request.computed + count) - len(request.pages))
        admits = self.waiting and self.free_slots
        return 1 if admits or needed > self.pool.num_free + self.tree.num_evictable else longest

    def plan(self, now_s: float, num_steps: int = 1) -> RankPlan:
        """This rank's part of a launch; more than one step only as `tokens_without_host` allows."""
        plan = RankPlan()
        page_size = self.limits.page_size
        for request in self.running[:]:  # a row's growth may retract a later one
            if (
                request.slot >= 0
                and request.wants_decode
                and (request.computed < len(request.pages) * page_size or self._grow(request))
            ):
                plan.decode.append(request)
        left = self.limits.step_tokens - tokens_of_rows(len(plan.decode))
        budget = min(self.limits.prefill_tokens, left)
        for request in self.running:
            if request.in_prefill:
                budget -= self._add_chunks(plan, request, budget)
        headroom = sum(map(self._growth, self.running)) if self.waiting else 0
        while (
            budget > 0
            and len(plan.chunks) < self.limits.prefill_chunks
            and (request := self._admit(now_s, headroom))
        ):
            plan.admitted.append(request)
            budget -= self._add_chunks(plan, request, budget)
            headroom += self._growth(request)
        # Long rows first: attention begins with them, and a GPU has short ones left to even out its end.
        decode = (r for r in plan.decode if r.slot >= 0)
        plan.decode = sorted(decode, key=attrgetter("computed"), reverse=True)
        if num_steps > 1:
            plan.counts = [min(num_steps, request.num_left) for request in plan.decode]
            for request, count in zip(plan.decode, plan.counts):
                self._add_pages(request, request.computed + count)
        for request, count in zip(plan.decode, plan.counts or repeat(1)):
            request.computed += count
            request.pending += count
        if self.checkpoints is not None:
            for chunk in plan.chunks:
                chunk.request.state_from = chunk.request.slot
            self.checkpoints.settle()
        if self.drafter is not None:
            self._add_drafts(plan, self.drafter)
        # A page may be given and exchanged for a shared one in the same step; a scatter has no order.
        newest = {(slot, index): page for slot, index, page in self.updates}
        plan.table_updates = [(slot, index, page) for (slot, index), page in newest.items()]
        self.updates = []
        return plan

    def _add_chunks(self, plan: RankPlan, request: Request, budget: int) -> int:
        """Plan what comes next of a prompt within the budget; returns its length.

        It is one chunk, but where a state is to be kept on the way.
        """
        length = self._add_chunk(plan, request, budget)
        while request.in_prefill and (more := self._add_chunk(plan, request, budget - length)):
            length += more
        return length

    def _add_drafts(self, plan: RankPlan, drafter: Drafter) -> None:
        """Guess what follows the decode rows, while rows and pages are left that nobody else needs."""
        drafting = [r for r in plan.decode if r.pending == 1 and r.may_draft]
        rows = drafter.max_rows
        if plan.chunks:
            rows = min(rows, rows_before(self.limits.step_tokens - plan.num_prefill_tokens))
        room = rows - len(plan.decode)
        for i, request in enumerate(drafting):
            count = min(
                max(room, 0) // (len(drafting) - i),
                drafter.max_drafts,
                request.num_left,
                self._spare_positions(request),
            )
            if count <= 0:
                continue
            plan.drafts[request] = drafts = drafter.propose(request, count)
            room -= len(drafts)
            self._add_pages(request, request.computed + len(drafts))

    def _spare_positions(self, request: Request) -> int:
        """How many positions after those computed can have pages without taking anybody's."""
        spare = self.pool.num_free + self.tree.num_evictable
        return (len(request.pages) + spare) * self.limits.page_size - request.computed

    def _add_chunk(self, plan: RankPlan, request: Request, budget: int) -> int:
        length = min(budget, self._chunk_end(request) - request.computed)
        if length <= 0 or len(plan.chunks) >= self.limits.prefill_chunks:
            return 0
        start = request.computed
        request.computed += length
        samples = request.computed == len(request.tokens)
        request.pending += samples
        request.in_prefill = not samples
        chunk = Chunk(request, start, length, samples)
        plan.chunks.append(chunk)
        self._publish(request)
        if self.checkpoints is not None:
            chunk.state_from = request.state_from
            if request.computed in self._checkpoints_wanted(request):
                assert request.node is not None
                chunk.state_kept = self.checkpoints.plan(request.node)
        return length

    def _chunk_end(self, request: Request) -> int:
        """How far a chunk may go: to the prompt's end, or to where a state is to be kept."""
        if self.checkpoints is None:
            return len(request.tokens)
        wanted = (p for p in self._checkpoints_wanted(request) if p > request.computed)
        return min(wanted, default=len(request.tokens))

    def _checkpoints_wanted(self, request: Request) -> tuple[int, ...]:
        """Where the prompt left what others had too, since more may come, and the end of its last full
        page, for whoever goes on from there."""
        if not self.tree.enabled or not self.limits.num_checkpoints:
            return ()
        size = self.limits.page_size
        return request.num_known, (len(request.tokens) - 1) // size * size

    def _admit(self, now_s: float, headroom: int) -> Request | None:
        """Give the first waiting request a slot and pages for all its tokens, or leave it waiting.

        `headroom`: pages that the running ones will want soon.
        """
        if not self.waiting or not self.free_slots:
            return None
        request = self.waiting[0]
        if request.pending:  # retracted, and its last token is still on the device
            return None
        node, shared = self._match(request)
        self.tree.lock(node)
        needed = self._pages_for(len(request.tokens)) - len(shared)
        room = self.pool.num_free + self.tree.num_evictable
        if needed + headroom > room:
            self.tree.unlock(node)
            return None
        self.waiting.pop(0)
        self._make_room(needed)
        request.slot, request.in_prefill = self.free_slots.pop(), True
        request.node, request.num_shared = node, len(shared)
        request.pages = shared + self.pool.allocate(needed)
        request.computed = len(shared) * self.limits.page_size
        if request.cached_tokens < 0:
            request.cached_tokens = min(request.computed, request.prompt_len)
            request.admitted_s = now_s
        self.updates.extend((request.slot, i, page) for i, page in enumerate(request.pages))
        insort(self.running, request, key=ORDER)
        return request

    def _match(self, request: Request) -> tuple[Node, list[int]]:
        """The cached prefix that a request can go on from, and its pages."""
        tokens, salt = request.tokens[: request.reuse_limit], request.spec.cache_salt
        if self.checkpoints is None:
            return self.tree.match(tokens, salt)
        node, pages, num_here = self.tree.match_state(tokens, salt)
        request.state_from, request.num_known = node.state, num_here * self.limits.page_size
        if node.state >= 0:
            self.checkpoints.touch(node)
        return node, pages

    def num_cached_tokens(self, tokens: Sequence[int], salt: str) -> int:
        """Leading tokens that need not be computed."""
        pages = self.tree.num_matched(tokens, salt, to_state=self.checkpoints is not None)
        return pages * self.limits.page_size

    def _grow(self, request: Request) -> bool:
        """Add a page for the next position; False when the request itself had to go."""
        while self.pool.num_free + self.tree.num_evictable < 1:
            victim = self.running[-1]
            self._retract(victim)
            if victim is request:
                return False
        self._add_pages(request, request.computed + 1)
        return True

    def _add_pages(self, request: Request, num_tokens: int) -> None:
        """Give a request the pages that so many positions take; the caller knows that there are as many."""
        needed = max(0, self._pages_for(num_tokens) - len(request.pages))
        self._make_room(needed)
        for page in self.pool.allocate(needed):
            self.updates.append((request.slot, len(request.pages), page))
            request.pages.append(page)

    def _make_room(self, num_pages: int) -> None:
        if self.pool.num_free < num_pages:
            self.tree.evict(num_pages - self.pool.num_free)

    def _growth(self, request: Request) -> int:
        """Pages that a running request will want soon."""
        length = min(request.max_len, len(request.tokens) + request.pending + GROWTH_TOKENS)
        return max(0, self._pages_for(length) - len(request.pages))

    def _retract(self, request: Request) -> None:
        """Take a running request's pages; it waits at its old place and resumes exactly."""
        request.num_retractions += 1
        self.release(request)
        self.queue(request)

    # ---- pages ----

    def _publish(self, request: Request) -> None:
        """Share the request's full pages. Later steps run after the one that writes them."""
        if not self.tree.enabled:
            return
        known = min(request.computed, len(request.tokens))
        full = known // self.limits.page_size
        if full <= request.num_shared:
            return
        node, path, spare = self.tree.insert(request.tokens, request.pages[:full], request.spec.cache_salt)
        self.updates.extend(
            (request.slot, i, new)
            for i, (old, new) in enumerate(zip(request.pages[:full], path))
            if old != new
        )
        request.pages[:full] = path
        self.pool.free(spare)
        self.tree.lock(node)
        if request.node is not None:
            self.tree.unlock(request.node)
        request.node, request.num_shared = node, full

    def release(self, request: Request) -> None:
        """Publish what is computed, give back the rest, and leave the running batch."""
        self._publish(request)
        self.pool.free(request.pages[request.num_shared :])
        assert request.node is not None
        self.tree.unlock(request.node)
        self.free_slots.append(request.slot)
        self.running.remove(request)
        self.updates = [u for u in self.updates if u[0] != request.slot]
        request.pages, request.node, request.num_shared = [], None, 0
        request.slot, request.computed, request.in_prefill = -1, 0, False
        request.state_from, request.num_known = -1, 0

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.limits.page_size)

    # ---- figures ----

    @property
    def drafts_next(self) -> bool:
        """Whether the next step may have drafts, which need every sampled token known."""
        if self.drafter is None:
            return False
        if not self.drafter.rests:
            return True
        decoding = [r for r in self.running if not r.in_prefill]
        return len(decoding) < self.drafter.max_rows and any(r.may_draft for r in decoding)

    @property
    def num_waiting_tokens(self) -> int:
        return sum(len(r.tokens) for r in self.waiting)

    @property
    def num_queued_tokens(self) -> int:
        """Known tokens that no launched step has computed."""
        in_prefill = sum(len(r.tokens) - r.computed for r in self.running if r.in_prefill)
        return in_prefill + self.num_waiting_tokens

    @property
    def num_used_tokens(self) -> int:
        """Tokens of pages that are neither free nor evictable."""
        used = self.limits.num_pages - self.pool.num_free - self.tree.num_evictable
        return used * self.limits.page_size

    def check(self) -> None:
        """Audit: every page and slot has one owner. Raises AssertionError."""
        self.tree.check()
        if self.checkpoints is not None:
            self.checkpoints.check(self.tree.nodes())
        private = [page for r in self.running for page in r.pages[r.num_shared :]]
        self.pool.check([*self.tree.pages(), *private])
        slots = sorted([*self.free_slots, *(r.slot for r in self.running)])
        assert slots == list(range(self.limits.num_slots)), f"slots lost or owned twice: {slots}"
        if not self.running:
            assert self.tree.num_evictable == self.tree.num_pages, "a prefix is locked, but nobody runs"
