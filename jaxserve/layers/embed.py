"""The vocabulary at both ends of a model: token embedding and output head."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxserve.layers.linear import project
from jaxserve.layers.weight import weight


class Vocabulary(nnx.Module):
    """Token embedding and logits, which share one matrix when `tied`.

    Args:
        prefix: of the checkpoint's `embed_tokens`.
        head: checkpoint tensor of the output head; unused when tied.
        scale: the embedding is multiplied by it, rounded to the model's dtype first (Gemma).
        softcap: logits become softcap * tanh(logits / softcap).
    """

    def __init__(
        self,
        prefix: str,
        vocab: int,
        hidden: int,
        *,
        tied: bool,
        dtype: DTypeLike,
        head: str = "lm_head.weight",
        scale: float | None = None,
        softcap: float | None = None,
    ):
        shape, axes = (vocab, hidden), ("vocab", "embed")
        self.embedding = weight(shape, axes, f"{prefix}embed_tokens.weight", dtype=dtype)
        self.head = None if tied else weight(shape, axes, head, dtype=dtype)
        self.scale = scale
        self.softcap = softcap

    def embed(self, token_T: jax.Array) -> jax.Array:
        """Embedding rows. Token ids are checked where a request enters; here they are in range."""
        hidden_TD = jnp.take(self.embedding[...], token_T, axis=0, mode="clip")
        if self.scale is None:
            return hidden_TD
        return hidden_TD * jnp.asarray(self.scale, hidden_TD.dtype)

    def logits(self, hidden_RD: jax.Array) -> jax.Array:
        """float32 logits [R, V]."""
        matrix = self.embedding if self.head is None else self.head
        logits_RV = project(hidden_RD, matrix, out_dtype=jnp.float32)
        if self.softcap is None:
            return logits_RV
        return jnp.tanh(logits_RV / self.softcap) * self.softcap
