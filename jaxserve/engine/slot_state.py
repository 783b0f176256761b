"""What sampling keeps of each slot on the devices: the programs that set it, and what it does to logits.

Arrays of all dp ranks are joined on axis 0.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxserve.engine.batch import NUM_BIASES, PREPARE_PACKING, Packing, mask_words
from jaxserve.engine.constraints import MASK_BITS
from jaxserve.mesh import per_rank
from jaxserve.ops import sampling

SlotState = dict[str, jax.Array]
"""What sampling keeps of each slot: `output_count` and `in_prompt` [S, V], `bias_id` and `bias_value`
[S, NUM_BIASES], and where grammars are served `mask` [S, words]: the tokens that may follow, a bit each.
Only slots whose request asks for penalties, biases or a grammar have theirs set."""
LARGEST_COUNT = 2**15 - 1
"""Of one token in an output: counts are of 16 bits, and stay there."""


def layout_of(vocab_size: int, masks: bool) -> dict[str, tuple[int, Any]]:
    """Entries of a slot and their type, for each part of a SlotState."""
    layout: dict[str, tuple[int, Any]] = {
        "output_count": (vocab_size, np.int16),
        "in_prompt": (vocab_size, np.bool_),
        "bias_id": (NUM_BIASES, np.int32),
        "bias_value": (NUM_BIASES, np.float32),
    }
    return layout | {"mask": (mask_words(vocab_size), np.int32)} if masks else layout


def prepare_slot(mesh: Mesh | None, slots: SlotState, packed_RM: jax.Array) -> SlotState:
    """Count the tokens of a request that has just got a slot, and set its biases."""
    return per_rank(mesh, _prepare_rank, slots, packed_RM)


def _prepare_rank(slots: SlotState, packed_1M: jax.Array) -> SlotState:
    f = PREPARE_PACKING.unpack(packed_1M)
    num_slots, vocab_size = slots["output_count"].shape
    slot = jnp.where(f["slot"][0] < 0, num_slots, f["slot"][0])
    keep = f["first"][0] == 0
    read = jnp.minimum(slot, num_slots - 1)

    def columns(token: jax.Array) -> jax.Array:
        return jnp.where(token < 0, vocab_size, token)

    count_V = jnp.where(keep, slots["output_count"][read], 0).astype(jnp.int32)
    count_V = jnp.minimum(count_V.at[columns(f["output"])].add(1, mode="drop"), LARGEST_COUNT)
    in_prompt_V = jnp.where(keep, slots["in_prompt"][read], False)
    in_prompt_V = in_prompt_V.at[columns(f["prompt"])].set(True, mode="drop")
    values = {
        "output_count": count_V.astype(slots["output_count"].dtype),
        "in_prompt": in_prompt_V,
        "bias_id": f["bias_id"],
        "bias_value": f["bias_value"],
    }
    return slots | {name: slots[name].at[slot].set(value, mode="drop") for name, value in values.items()}


def set_masks(packing: Packing, mesh: Mesh | None, mask_SW: jax.Array, packed_RM: jax.Array) -> jax.Array:
    """Say which tokens may follow in some slots."""
    f = packing.unpack(packed_RM)

    def on_rank(mask_SW: jax.Array, slot_N: jax.Array, new: jax.Array) -> jax.Array:
        slot_N = jnp.where(slot_N < 0, mask_SW.shape[0], slot_N)
        return mask_SW.at[slot_N].set(new.reshape(slot_N.shape[0], -1), mode="drop")

    return per_rank(mesh, on_rank, mask_SW, f["slot"], f["mask"])


def count_rows(count_SV: jax.Array, slot_R: jax.Array, token_R: jax.Array) -> jax.Array:
    slot_R = jnp.where(slot_R < 0, count_SV.shape[0], slot_R)
    has_room_R = count_SV.at[slot_R, token_R].get(mode="fill", fill_value=LARGEST_COUNT) < LARGEST_COUNT
    return count_SV.at[slot_R, token_R].add(has_room_R.astype(count_SV.dtype), mode="drop")


def adjust(logits_RV: jax.Array, slots: SlotState, f: dict[str, jax.Array]) -> jax.Array:
    """Penalties, masks and biases; rows without them keep their logits, whatever their slot holds."""
    slot_R = jnp.maximum(f["slot"], 0)
    logits_RV = sampling.penalize(
        logits_RV,
        slots["output_count"][slot_R],
        slots["in_prompt"][slot_R],
        f["frequency"],
        f["presence"],
        f["repetition"],
    )
    if "mask" in slots:
        allowed_RV = _bits(slots["mask"][slot_R], logits_RV.shape[1]) | (f["has_mask"] == 0)[:, None]
        logits_RV = jnp.where(allowed_RV, logits_RV, -jnp.inf)
    bias_id_RB, bias_RB = slots["bias_id"][slot_R], slots["bias_value"][slot_R]
    number_B = jnp.arange(bias_id_RB.shape[1])
    first_R = f["first_bias"]
    active_RB = (number_B >= first_R[:, None]) & (first_R[:, None] >= 0) & (bias_id_RB >= 0)
    column_RB = jnp.where(active_RB, bias_id_RB, logits_RV.shape[1])
    row_RB = jnp.broadcast_to(jnp.arange(slot_R.shape[0])[:, None], column_RB.shape)
    return logits_RV.at[row_RB, column_RB].add(bias_RB, mode="drop")


def _bits(words_RW: jax.Array, length: int) -> jax.Array:
    """[R, length] bool of words of MASK_BITS bits, the lowest first."""
    bits_RWB = (words_RW[:, :, None] >> jnp.arange(MASK_BITS)) & 1
    return bits_RWB.reshape(words_RW.shape[0], -1)[:, :length] == 1
