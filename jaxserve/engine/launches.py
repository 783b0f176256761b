"""Which programs a step starts, and with what: from a plan to packed arguments, in order.

What a `Launch` says is all that another host of the instance needs to start the same. Nothing here
touches a device.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxserve.engine import batch
from jaxserve.engine.batch import Bucket, Packing
from jaxserve.engine.nextn import NextnLayer
from jaxserve.engine.plan import RankPlan, StepPlan
from jaxserve.engine.programs import VARIANTS, Variant
from jaxserve.engine.request import Request


@dataclass(frozen=True, slots=True)
class Launch:
    """One device program to start: its key, and its packed argument [ranks, length]."""

    program: Any
    packed: np.ndarray


class Launches:
    """Packs the steps of an instance.

    Args:
        buckets: in the order in which they are tried.
        states: whether the model has recurrent layers.
        decode_steps: of one launch that has nothing but decode to do.
        nextn: the model's own layer for guesses, when it is used.
        masks: how masks of tokens travel, for each number of them; empty where no grammars are served.
    """

    def __init__(
        self,
        num_ranks: int,
        buckets: Sequence[Bucket],
        states: bool,
        decode_steps: int,
        nextn: NextnLayer | None,
        masks: Mapping[int, Packing] | None = None,
    ):
        self._num_ranks, self._buckets, self._nextn = num_ranks, buckets, nextn
        self.masks = dict(masks or {})
        self.forward = {b: batch.forward_packing(b, states) for b in buckets}
        self.score = {b: batch.score_packing(b) for b in buckets if b.chunks}
        self.sample = {
            (b.num_samples, v): batch.sample_packing(b.num_samples, v.random, v.filters, v.logprobs)
            for b in buckets
            for v in VARIANTS
        }
        self.decode = {b: batch.decode_packing(b) for b in buckets if decode_steps > 1 and not b.chunks}

    def bucket_of(self, plan: StepPlan) -> Bucket:
        """The first that holds the plan."""
        rows = max(rank.num_rows for rank in plan.ranks)
        tokens = max(rank.num_tokens for rank in plan.ranks)
        chunks = max(len(rank.chunks) for rank in plan.ranks)
        for b in self._buckets:
            if b.rows >= rows and b.num_tokens >= tokens and b.chunks >= chunks:
                return b
        raise AssertionError(f"no bucket for {tokens} tokens, {rows} of them rows, and {chunks} chunks")

    def of_step(self, plan: StepPlan, bucket: Bucket) -> list[Launch]:
        """The programs of a step in their order; empties what table updates overflow.

        Without those of `of_sampling` where the plan is constrained.
        """
        ranks = plan.ranks
        overflow = batch.pack_overflow(ranks, bucket.num_updates)
        launches = [Launch("update_table", packed) for packed in overflow]
        if plan.num_steps > 1:
            return [*launches, self._decode(bucket, ranks)]
        for rank in ranks:
            for request in rank.admitted:
                if request.needs_slot_state:
                    parts = batch.pack_prepare(self._num_ranks, request)
                    launches += [Launch("prepare_slot", packed) for packed in parts]
        launches.append(self._forward(bucket, ranks))
        if not plan.is_constrained:
            launches += self.of_sampling(plan, bucket)
        if any(chunk.request.wants_prompt_logprobs for rank in ranks for chunk in rank.chunks):
            launches.append(self._score(bucket, ranks))
        return launches

    def of_sampling(self, plan: StepPlan, bucket: Bucket) -> list[Launch]:
        requests = [request for rank in plan.ranks for request in rank.sampled]
        if not requests:
            return []
        return [self._sample((bucket.num_samples, choose_variant(requests)), plan.ranks)]

    def of_masks(
        self, masked: Sequence[Sequence[Request]], fill: Callable[[np.ndarray, Sequence[Request]], None]
    ) -> list[Launch]:
        """What tells the devices which tokens may follow in the slots of `masked`, requests of each rank.

        `fill(masks_RW, requests)` writes the masks of some of them into rows.
        """
        most = max(map(len, masked))
        if not most:
            return []
        size = next(size for size in self.masks if size >= most)
        packing = self.masks[size]
        packed = np.zeros((self._num_ranks, packing.length), np.int32)
        for row, requests in zip(packed, masked):
            f = packing.views(row)
            f["slot"].fill(-1)
            if requests:
                f["slot"][: len(requests)] = [request.slot for request in requests]
                fill(f["mask"].reshape(size, -1)[: len(requests)], requests)
        return [Launch(("set_masks", size), packed)]

    def padding(self) -> list[list[Launch]]:
        """Steps in which no rank does anything, which together run every program of a step."""
        plan = StepPlan(0, [RankPlan() for _ in range(self._num_ranks)])
        ranks = plan.ranks
        out: list[list[Launch]] = []
        sampled: set[int] = set()
        for bucket in self._buckets:
            step = [self._forward(bucket, ranks)]
            if bucket.num_samples not in sampled:
                sampled.add(bucket.num_samples)
                step += [self._sample((bucket.num_samples, variant), ranks) for variant in VARIANTS]
            if bucket in self.score:
                step.append(self._score(bucket, ranks))
            if self._nextn is not None:
                packed = self._nextn.pack(bucket, plan, [()] * self._num_ranks)
                step.append(Launch(("nextn", bucket), packed))
            if bucket in self.decode:
                step.append(self._decode(bucket, ranks))
            out.append(step)
        for key, packing in (("update_table", batch.UPDATE_PACKING), ("prepare_slot", batch.PREPARE_PACKING)):
            out.append([Launch(key, np.full((self._num_ranks, packing.length), -1, np.int32))])
        for size, packing in self.masks.items():
            packed = np.full((self._num_ranks, packing.length), -1, np.int32)
            out.append([Launch(("set_masks", size), packed)])
        return out

    def _forward(self, bucket: Bucket, ranks: list[RankPlan]) -> Launch:
        return Launch(bucket, batch.pack_forward(bucket, self.forward[bucket], ranks))

    def _decode(self, bucket: Bucket, ranks: list[RankPlan]) -> Launch:
        return Launch(("decode", bucket), batch.pack_decode(self.decode[bucket], ranks))

    def _sample(self, key: tuple[int, Variant], ranks: list[RankPlan]) -> Launch:
        return Launch(key, batch.pack_sample(key[0], self.sample[key], ranks))

    def _score(self, bucket: Bucket, ranks: list[RankPlan]) -> Launch:
        return Launch(("score", bucket), batch.pack_score(bucket, self.score[bucket], ranks))


def choose_variant(requests: Sequence[Request]) -> Variant:
    """The cheapest sample program that serves every row."""
    return VARIANTS[max(request.sampling_work for request in requests)]
