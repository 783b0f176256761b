"""The pre-norm transformer block that Llama, Mistral and Qwen share."""

from collections.abc import Callable

import jax
from flax import nnx

from jaxserve.layers.attention import StepContext
from jaxserve.layers.norm import RMSNorm

Feed = Callable[[jax.Array], jax.Array]


class PreNormBlock(nnx.Module):
    """hidden + attention(norm(hidden)), then hidden + feed_forward(norm(hidden))."""

    def __init__(
        self,
        attention_norm: RMSNorm,
        attention: Callable[[jax.Array, StepContext], jax.Array],
        feed_norm: RMSNorm,
        feed: Feed,
    ):
        self.attention_norm = attention_norm
        self.attention = attention
        self.feed_norm = feed_norm
        self.feed = feed

    def __call__(self, hidden_TD: jax.Array, step: StepContext) -> jax.Array:
        hidden_TD = hidden_TD + self.attention(self.attention_norm(hidden_TD), step)
        return hidden_TD + self.feed(self.feed_norm(hidden_TD))
