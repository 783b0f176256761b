"""Which experts a token goes to, and with what weights, from the router's logits."""

import jax

from jaxserve.ops import backend
from jaxserve.ops.routing import fast, reference
from jaxserve.ops.routing.rule import Routing

__all__ = ["Routing", "choose"]


def choose(
    routing: Routing,
    logits_TE: jax.Array,
    bias_E: jax.Array | None = None,
    slot_T: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(expert_TX int32, weight_TX float32), the best first. `bias_E` moves the choice and not the weights.

    Where `slot_T` (int32) is -1 is padding: its experts are -1, and its weights are not to be used.
    Of equal experts the one with the lower number comes first, and of equal groups.
    Source: DeepSeek-V3 technical report, section 2.1.2 (sigmoid, bias); DeepSeek-V2, 2.2.1 (groups).
    """
    if (chosen := backend.chosen()) == "reference":
        return reference.choose(routing, logits_TE, bias_E, slot_T)
    return fast.choose(routing, logits_TE, bias_E, slot_T, interpret=chosen == "interpret")
