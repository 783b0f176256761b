"""Grouped-query attention over the paged KV pool."""

from dataclasses import replace
from functools import partial
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxserve.layers.linear import Projections
from jaxserve.layers.norm import RMSNorm
from jaxserve.layers.operand import Rows
from jaxserve.layers.quant import BlockFP8, linear_weight
from jaxserve.layers.rope import Rope
from jaxserve.layers.split_product import project_split
from jaxserve.layers.step_context import StepContext
from jaxserve.layers.weight import weight
from jaxserve.ops.kv_write import Heads


class Attention(nnx.Module):
    """Self-attention of one layer: projections, optional q/k norm, rotation, paged attention, output.

    Weights keep heads apart ([H, K, D] for queries) so that a mesh splits whole heads.

    Args:
        name: of the checkpoint's module, such as `model.layers.0.self_attn`.
        scale: of the scores; by default head_dim ** -0.5.
        window: tokens attended, the own one included; None is all.
        qk_norm_eps: when given, queries and keys are RMS-normalized before rotation.
        qk_norm_over: each head alone, or all heads of the layer together.
        sinks: the layer has a learned logit for each head that takes weight and gives nothing.
    """

    def __init__(
        self,
        name: str,
        layer: int,
        *,
        hidden: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rope: Rope,
        dtype: DTypeLike,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm_eps: float | None = None,
        qk_norm_over: Literal["head", "layer"] = "head",
        sinks: bool = False,
        norm_offset: float = 0.0,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        quant: BlockFP8 | None = None,
    ):
        D, H, G, K = hidden, num_q_heads, num_kv_heads, head_dim
        self.layer = layer
        self.rope = rope
        self.scale = K**-0.5 if scale is None else scale
        self.window = window
        self.softcap = softcap

        declare, norm = (
            partial(weight, dtype=dtype),
            partial(RMSNorm, offset=norm_offset, axis=None, dtype=dtype),
        )
        parts = (("q_proj", H, "q_heads"), ("k_proj", G, "kv_heads"), ("v_proj", G, "kv_heads"))
        matrix = partial(linear_weight, dtype=dtype, quant=quant)
        weights = [matrix((n, K, D), (axis, None, "embed"), f"{name}.{p}.weight") for p, n, axis in parts]
        biases = [declare((n, K), (axis, None), f"{name}.{p}.bias") for p, n, axis in parts if qkv_bias]
        self.qkv = Projections(weights, biases)
        self.o = matrix((D, H, K), ("embed", "q_heads", None), f"{name}.o_proj.weight", num_out=1)
        self.o_bias = declare((D,), ("embed",), f"{name}.o_proj.bias") if out_bias else None
        q_size, k_size = (K, K) if qk_norm_over == "head" else (H * K, G * K)
        self.q_norm = None if qk_norm_eps is None else norm(f"{name}.q_norm", q_size, eps=qk_norm_eps)
        self.k_norm = None if qk_norm_eps is None else norm(f"{name}.k_norm", k_size, eps=qk_norm_eps)
        self.norm_over = qk_norm_over
        # As attention takes them: a step would convert them anew.
        sink = partial(weight, (H,), ("q_heads",), f"{name}.sinks", dtype=jnp.float32, init="zeros")
        self.sinks = sink() if sinks else None

    def __call__(self, hidden_TD: Rows, step: StepContext) -> Rows:
        query, key, value = self.qkv.heads(hidden_TD)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self._norm(self.q_norm, query), self._norm(self.k_norm, key)
        out_THK = step.attend(
            self.layer,
            query,
            key,
            value,
            rotation=step.rope(self.rope),
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
            sinks_H=None if self.sinks is None else self.sinks[...],
        )
        return project_split(out_THK, self.o, self.o_bias, step)

    def _norm(self, norm: RMSNorm, heads: Heads) -> Heads:
        if self.norm_over == "head":
            return replace(heads, norm=norm.of_heads())
        x_THK = heads.value_THK
        return Heads.whole(norm(x_THK.reshape(x_THK.shape[0], -1)).reshape(x_THK.shape))
