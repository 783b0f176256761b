"""The layer for multi-token prediction (MTP): a guess of the token after next.

Source: DeepSeek-V3 technical report, section 2.2; tensor names as its checkpoints have them.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxserve.layers.block import PreNormBlock
from jaxserve.layers.linear import project
from jaxserve.layers.norm import RMSNorm
from jaxserve.layers.step_context import StepContext
from jaxserve.layers.weight import weight


class NextToken(nnx.Module):
    """Joins a token's hidden state with the embedding of the token after it, and runs one block.

    Embedding and output head are the model's own; checkpoints repeat them (`unserved`).
    """

    def __init__(self, name: str, block: PreNormBlock, hidden: int, *, eps: float, dtype: DTypeLike):
        self.block = block
        self.embed_norm = RMSNorm(f"{name}.enorm", hidden, eps=eps, dtype=dtype)
        self.hidden_norm = RMSNorm(f"{name}.hnorm", hidden, eps=eps, dtype=dtype)
        self.join = weight((hidden, 2 * hidden), (None, "embed"), f"{name}.eh_proj.weight", dtype=dtype)
        self.norm = RMSNorm(f"{name}.shared_head.norm", hidden, eps=eps, dtype=dtype)
        self.unserved = (f"{name}.embed_tokens.", f"{name}.shared_head.head.")

    def __call__(self, embedded_TD: jax.Array, hidden_TD: jax.Array, step: StepContext) -> jax.Array:
        """`hidden_TD` has the model's final norm, and so has what comes out."""
        joined_TC = jnp.concatenate([self.embed_norm(embedded_TD), self.hidden_norm(hidden_TD)], -1)
        return self.norm(self.block(project(joined_TC, self.join), step))
