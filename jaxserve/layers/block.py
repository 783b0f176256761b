"""Transformer blocks: how attention and feed-forward join the residual stream."""

from typing import Protocol

from flax import nnx
from jax.typing import DTypeLike

from jaxserve.layers.norm import RMSNorm
from jaxserve.layers.operand import Rows, add
from jaxserve.layers.step_context import StepContext


class Sublayer(Protocol):
    """Attention, or a feed-forward layer: dense, or experts, which ask the step who computes them."""

    def __call__(self, hidden_TD: Rows, step: StepContext) -> Rows: ...


class PreNormBlock(nnx.Module):
    """Norms before attention and feed-forward (Llama, Mistral, Qwen)."""

    def __init__(
        self, name: str, attention: Sublayer, feed: Sublayer, *, hidden: int, eps: float, dtype: DTypeLike
    ):
        self.attention_norm = RMSNorm(f"{name}.input_layernorm", hidden, eps=eps, dtype=dtype)
        self.attention = attention
        self.feed_norm = RMSNorm(f"{name}.post_attention_layernorm", hidden, eps=eps, dtype=dtype)
        self.feed = feed

    def __call__(self, hidden_TD: Rows, step: StepContext) -> Rows:
        hidden_TD = add(hidden_TD, self.attention(self.attention_norm.operand(hidden_TD), step))
        return add(hidden_TD, self.feed(self.feed_norm.operand(hidden_TD), step))
