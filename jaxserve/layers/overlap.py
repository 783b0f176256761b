"""A model's blocks over the whole step, or over two halves of it in turn.

With two halves, what one sends between devices does not depend on what the other computes in the
same block, so that a device may do both at once. The halves share the KV pool: attention of the
second one comes after the first one's in the same block, since it may attend to its tokens, and
before the first one's in the next block. Source: DeepSeek-V3 technical report, section 3.4 (two
micro-batches).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.layers.operand import Rows, wide
from jaxserve.layers.step_context import QueryBlocks, StepContext

Block = Callable[[Any, StepContext], Rows]  # takes what its like gives: arrays, or Rows


def run_blocks(blocks: Iterable[Block], hidden_TD: jax.Array, step: StepContext) -> jax.Array:
    """Every block in its order, on the halves in turn where the step has two."""
    cut = Cut.of(step)
    if cut is None:
        rows_TD: Rows = hidden_TD
        for block in blocks:
            rows_TD = block(rows_TD, step)
        return wide(rows_TD)
    halves, hidden = cut.halve(step), list[Rows](cut.split(step, hidden_TD))
    pools = step.key_pages, step.value_pages
    for number, block in enumerate(blocks):
        for i, half in enumerate(halves):
            half.key_pages, half.value_pages = pools
            with jax.named_scope(f"half{i}/block{number}"):
                hidden[i] = block(hidden[i], half)
            pools = half.key_pages, half.value_pages
    step.key_pages, step.value_pages = pools
    for layer in halves[0].chosen:
        step.chosen[layer] = cut.join(step, halves[0].chosen[layer], halves[1].chosen[layer])
    return cut.join(step, *map(wide, hidden))


@dataclass(frozen=True)
class Cut:
    """Where each rank's tokens are cut in two."""

    tokens: int  # of the first half
    rows: int  # of those, decode rows at most

    @classmethod
    def of(cls, step: StepContext) -> "Cut | None":
        """None where the step runs whole: it is to, or it has one token."""
        num_tokens = step.slot_T.shape[0] // step.num_ranks
        if not step.two_batches or num_tokens < 2:
            return None
        half = -(-num_tokens // 2)
        return cls(half, min(step.R, half))

    def split(self, step: StepContext, x_T: jax.Array) -> tuple[jax.Array, jax.Array]:
        """An array over the step's tokens, as one over each half's."""
        return step.per_rank(lambda x, _: (x[: self.tokens], x[self.tokens :]), x_T)

    def join(self, step: StepContext, first_T: jax.Array, second_T: jax.Array) -> jax.Array:
        """What `split` gives, as it was."""
        return step.per_rank(lambda halves, _: jnp.concatenate(halves), (first_T, second_T))

    def halve(self, step: StepContext) -> tuple[StepContext, StepContext]:
        """The step's view of each half; a query block that lies across the cut is in both, a part in each."""
        position, slot = self.split(step, step.position_T), self.split(step, step.slot_T)
        context_len, blocks = self._rows(step), self._blocks(step.blocks)
        first, second = (step.part(position[i], slot[i], context_len[i], blocks[i]) for i in (0, 1))
        return first, second

    def _rows(self, step: StepContext) -> tuple[jax.Array | None, jax.Array | None]:
        if step.context_len_R is None or self.rows == step.R:
            return step.context_len_R, None
        return Cut(self.rows, self.rows).split(step, step.context_len_R)

    def _blocks(self, blocks: QueryBlocks | None) -> tuple[QueryBlocks | None, QueryBlocks | None]:
        if blocks is None:
            return None, None
        slot_B, start_B, len_B, pos_B = blocks
        before_B = jnp.clip(self.tokens - start_B, 0, len_B)  # tokens of a block before the cut
        return (
            QueryBlocks(slot_B, jnp.where(before_B > 0, start_B, 0), before_B, pos_B),
            QueryBlocks(slot_B, jnp.maximum(start_B - self.tokens, 0), len_B - before_B, pos_B + before_B),
        )
