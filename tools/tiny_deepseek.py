"""A DeepSeek-V3-shaped model for training on a CPU: what `tools.train_tiny` trains and writes.

Latent attention, sigmoid routing with groups and correction bias, shared expert, one next-next-token
(MTP) layer. Written for whole sequences and gradients, apart from the serving code, so that a test can
hold one against the other. Source: DeepSeek-V3 technical report (2024), sections 2.1 and 2.2.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

QUERIES = 64  # that meet the keys up to the last of them in one product
BLOCK = 128  # rows of one expert in one product
NOWHERE = np.int32(2**30)  # an index past the end of every array: reads give zeros, writes are dropped


@dataclass(frozen=True)
class Shape:
    """Dimensions; the defaults have 2.8 million parameters, the MTP layer included."""

    vocab: int = 320
    hidden: int = 192
    dense_ffn: int = 512
    expert_ffn: int = 48
    layers: int = 4
    dense_layers: int = 1
    heads: int = 8
    nope: int = 16
    rope: int = 8
    value: int = 16
    q_rank: int = 96
    kv_rank: int = 48
    experts: int = 16
    groups: int = 4
    groups_kept: int = 2
    experts_per_token: int = 4
    routed_scale: float = 2.5
    theta: float = 10000.0
    eps: float = 1e-6
    context: int = 2048

    def hf_config(self) -> dict[str, Any]:
        """The config.json of this shape."""
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "attention_bias": False,
            "bos_token_id": 256,
            "eos_token_id": 257,
            "dtype": "bfloat16",
            "first_k_dense_replace": self.dense_layers,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.dense_ffn,
            "kv_lora_rank": self.kv_rank,
            "max_position_embeddings": self.context,
            "moe_intermediate_size": self.expert_ffn,
            "moe_layer_freq": 1,
            "n_group": self.groups,
            "n_routed_experts": self.experts,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_attention_heads": self.heads,
            "num_experts_per_tok": self.experts_per_token,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.heads,
            "num_nextn_predict_layers": 1,
            "q_lora_rank": self.q_rank,
            "qk_nope_head_dim": self.nope,
            "qk_rope_head_dim": self.rope,
            "rms_norm_eps": self.eps,
            "rope_interleave": True,
            "rope_scaling": None,
            "rope_theta": self.theta,
            "routed_scaling_factor": self.routed_scale,
            "scoring_func": "sigmoid",
            "tie_word_embeddings": False,
            "topk_group": self.groups_kept,
            "topk_method": "noaux_tc",
            "v_head_dim": self.value,
            "vocab_size": self.vocab,
        }


def matrix(rngs: nnx.Rngs, *shape: int) -> nnx.Param:
    """[..., out, in] with a deviation of 1 / sqrt(in)."""
    return nnx.Param(jax.random.normal(rngs.params(), shape) * shape[-1] ** -0.5)


def linear(x: jax.Array, weight: nnx.Param) -> jax.Array:
    return jnp.einsum("...i,oi->...o", x, weight[...])


class Norm(nnx.Module):
    def __init__(self, size: int, eps: float):
        self.weight = nnx.Param(jnp.ones(size))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + self.eps) * self.weight[...]


class LatentAttention(nnx.Module):
    """Multi-head latent attention, unabsorbed. Source: section 2.1.1."""

    def __init__(self, s: Shape, rngs: nnx.Rngs):
        self.s = s
        self.q_a_proj = matrix(rngs, s.q_rank, s.hidden)
        self.q_a_layernorm = Norm(s.q_rank, s.eps)
        self.q_b_proj = matrix(rngs, s.heads * (s.nope + s.rope), s.q_rank)
        self.kv_a_proj_with_mqa = matrix(rngs, s.kv_rank + s.rope, s.hidden)
        self.kv_a_layernorm = Norm(s.kv_rank, s.eps)
        self.kv_b_proj = matrix(rngs, s.heads * (s.nope + s.value), s.kv_rank)
        self.o_proj = matrix(rngs, s.hidden, s.heads * s.value)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        s, (B, T, _) = self.s, x_BTD.shape
        query = linear(self.q_a_layernorm(linear(x_BTD, self.q_a_proj)), self.q_b_proj)
        query = query.reshape(B, T, s.heads, s.nope + s.rope)
        query = jnp.concatenate([query[..., : s.nope], rotate(query[..., s.nope :], s.theta)], -1)
        latent = linear(x_BTD, self.kv_a_proj_with_mqa)
        key_value = linear(self.kv_a_layernorm(latent[..., : s.kv_rank]), self.kv_b_proj)
        key_value = key_value.reshape(B, T, s.heads, s.nope + s.value)
        key_rope = rotate(latent[..., None, s.kv_rank :], s.theta)
        key_rope = jnp.broadcast_to(key_rope, (B, T, s.heads, s.rope))
        key = jnp.concatenate([key_value[..., : s.nope], key_rope], -1)
        value = key_value[..., s.nope :]
        out = jax.lax.map(lambda sequence: attend(*sequence), (query, key, value))
        return linear(out.reshape(B, T, -1), self.o_proj)


@jax.checkpoint
def attend(query_THK: jax.Array, key_THK: jax.Array, value_THK: jax.Array) -> jax.Array:
    """Causal attention within one sequence.

    One at a time, and again for the gradient, because scores of a whole batch (34 MB) leave the cache
    and take fresh pages at every step: forward and backward took 240 ms of CPU a layer, and now 55.
    """
    T, _, K = query_THK.shape
    out = []
    for begin in range(0, T, QUERIES):
        seen = min(begin + QUERIES, T)  # keys further right are nobody's
        scores = jnp.einsum("qhk,shk->hqs", query_THK[begin:seen] * K**-0.5, key_THK[:seen])
        causal = jnp.arange(begin, seen)[:, None] >= jnp.arange(seen)
        weight = jax.nn.softmax(jnp.where(causal, scores, -1e30))
        out.append(jnp.einsum("hqs,shk->qhk", weight, value_THK[:seen]))
    return jnp.concatenate(out)


def rotate(x_BTHK: jax.Array, theta: float) -> jax.Array:
    """Rotary positions on pairs (2i, 2i + 1). Source: Su et al. 2021, section 3.2."""
    T, K = x_BTHK.shape[1], x_BTHK.shape[3]
    angle = jnp.arange(T, dtype=jnp.float32)[:, None] * theta ** (-jnp.arange(0, K, 2, dtype=jnp.float32) / K)
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    even, odd = x_BTHK[..., 0::2], x_BTHK[..., 1::2]
    return jnp.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(x_BTHK.shape)


class MLP(nnx.Module):
    def __init__(self, hidden: int, ffn: int, rngs: nnx.Rngs):
        self.gate_proj = matrix(rngs, ffn, hidden)
        self.up_proj = matrix(rngs, ffn, hidden)
        self.down_proj = matrix(rngs, hidden, ffn)

    def __call__(self, x: jax.Array) -> jax.Array:
        return linear(jax.nn.silu(linear(x, self.gate_proj)) * linear(x, self.up_proj), self.down_proj)


class Bias(nnx.Variable):
    """The routing's correction bias: moved by load, not by gradients."""


class MoE(nnx.Module):
    """Routed experts of bounded capacity, and one shared expert. Source: section 2.1.2."""

    def __init__(self, s: Shape, rngs: nnx.Rngs):
        self.s = s
        self.gate = matrix(rngs, s.experts, s.hidden)
        self.bias = Bias(jnp.zeros(s.experts))
        self.experts_gate = matrix(rngs, s.experts, s.expert_ffn, s.hidden)
        self.experts_up = matrix(rngs, s.experts, s.expert_ffn, s.hidden)
        self.experts_down = matrix(rngs, s.experts, s.hidden, s.expert_ffn)
        self.shared_experts = MLP(s.hidden, s.expert_ffn, rngs)

    def __call__(self, x_BTD: jax.Array, capacity_factor: float) -> tuple[jax.Array, jax.Array]:
        """Returns the output and each expert's share of the load, [E], 1 on average.

        `capacity_factor`: an expert takes so many times its even share of tokens; the rest skip it.
        """
        s = self.s
        x_TD = x_BTD.reshape(-1, s.hidden)
        expert_TX, weight_TX = self.route(x_TD)
        even = expert_TX.size / s.experts
        capacity = int(even * capacity_factor) + 1
        count_E, slot_TX, pair_S1, expert_N = place(expert_TX, s.experts, capacity)
        token_S1 = pair_S1 // s.experts_per_token
        rows = sum_rows(x_TD, token_S1, slot_TX).reshape(-1, BLOCK, s.hidden)
        weight = sum_rows(weight_TX.reshape(-1, 1), pair_S1, slot_TX.reshape(-1, 1)).reshape(-1, BLOCK, 1)
        gate, up, down = (w[...][expert_N] for w in (self.experts_gate, self.experts_up, self.experts_down))
        inner = jax.nn.silu(jnp.einsum("nsd,nfd->nsf", rows, gate)) * jnp.einsum("nsd,nfd->nsf", rows, up)
        out = jnp.einsum("nsf,ndf->nsd", inner * weight, down)
        routed_TD = sum_rows(out.reshape(-1, s.hidden), slot_TX, token_S1)
        return routed_TD.reshape(x_BTD.shape) + self.shared_experts(x_BTD), count_E.astype(jnp.float32) / even

    def route(self, x_TD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Experts and weights of each token, [T, X]."""
        s = self.s
        score_TE = jax.nn.sigmoid(linear(x_TD, self.gate))
        choice_TE = jax.lax.stop_gradient(score_TE + self.bias[...])
        grouped = choice_TE.reshape(-1, s.groups, s.experts // s.groups)
        group_score = jnp.sum(jax.lax.top_k(grouped, 2)[0], -1)
        kept = jax.lax.top_k(group_score, s.groups_kept)[1]
        mask = jax.nn.one_hot(kept, s.groups, dtype=bool).any(1)
        choice_TE = jnp.where(jnp.repeat(mask, s.experts // s.groups, axis=1), choice_TE, 0.0)
        expert_TX = jax.lax.top_k(choice_TE, s.experts_per_token)[1]
        weight_TX = jnp.take_along_axis(score_TE, expert_TX, 1)
        return expert_TX, weight_TX / (weight_TX.sum(-1, keepdims=True) + 1e-20) * s.routed_scale


def place(expert_TX: jax.Array, E: int, capacity: int) -> tuple[jax.Array, ...]:
    """Lays tokens out in N blocks of `BLOCK` rows, each block of one expert.

    Returns how many tokens chose each expert, [E]; the row of each token's choice, [T, X], `NOWHERE` past
    the first `capacity` tokens of an expert; which choice, t * X + x, each row is for, [N * BLOCK, 1],
    `NOWHERE` if none; and each block's expert, [N]. N is enough for any load.
    """
    T, X = expert_TX.shape
    N = T * X // BLOCK + E
    chosen_TE = jax.nn.one_hot(expert_TX, E, dtype=jnp.int32).sum(1)
    count_E = chosen_TE.sum(0)
    blocks_E = -(-jnp.minimum(count_E, capacity) // BLOCK)
    end_E = jnp.cumsum(blocks_E)
    expert_N = jnp.minimum(jnp.sum(jnp.arange(N)[:, None] >= end_E, -1), E - 1)
    place_TE = jnp.cumsum(chosen_TE, 0) - 1
    slot_TE = jnp.where(place_TE < capacity, (end_E - blocks_E) * BLOCK + place_TE, NOWHERE)
    slot_TX = jnp.take_along_axis(slot_TE, expert_TX, 1)
    pair_S = jnp.full(N * BLOCK, NOWHERE).at[slot_TX.reshape(-1)].set(jnp.arange(T * X), mode="drop")
    return count_E, slot_TX, pair_S[:, None], expert_N


@jax.custom_vjp
def sum_rows(x_ND: jax.Array, index_MK: jax.Array, inverse_NJ: jax.Array) -> jax.Array:
    """[M, D]: the sum over k of the rows `index_MK` of x; `NOWHERE` adds nothing.

    `inverse_NJ` names the rows of the result that each row of x is added to, so that the gradient is
    such a sum as well. XLA's own gradient is a scatter, which runs row by row on a CPU.
    """
    rows = (x_ND.at[index_M].get(mode="fill", fill_value=0) for index_M in index_MK.T)
    return functools.reduce(jnp.add, rows)


def _sum_rows_forward(x_ND, index_MK, inverse_NJ):
    return sum_rows(x_ND, index_MK, inverse_NJ), (index_MK, inverse_NJ)


def _sum_rows_backward(indices, gradient_MD):
    index_MK, inverse_NJ = indices
    return sum_rows(gradient_MD, inverse_NJ, index_MK), None, None


sum_rows.defvjp(_sum_rows_forward, _sum_rows_backward)


class Block(nnx.Module):
    def __init__(self, s: Shape, dense: bool, rngs: nnx.Rngs):
        self.input_layernorm = Norm(s.hidden, s.eps)
        self.self_attn = LatentAttention(s, rngs)
        self.post_attention_layernorm = Norm(s.hidden, s.eps)
        self.mlp = MLP(s.hidden, s.dense_ffn, rngs) if dense else MoE(s, rngs)

    def __call__(self, x: jax.Array, capacity_factor: float) -> tuple[jax.Array, jax.Array | None]:
        x = x + self.self_attn(self.input_layernorm(x))
        inner = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MLP):
            return x + self.mlp(inner), None
        out, load = self.mlp(inner, capacity_factor)
        return x + out, load


class TinyDeepseek(nnx.Module):
    """The model; `__call__` gives logits of the next token and, from the MTP layer, of the one after."""

    def __init__(self, s: Shape, rngs: nnx.Rngs):
        self.s = s
        self.embed_tokens = nnx.Param(jax.random.normal(rngs.params(), (s.vocab, s.hidden)) * 0.02)
        self.layers = nnx.List([Block(s, i < s.dense_layers, rngs) for i in range(s.layers)])
        self.norm = Norm(s.hidden, s.eps)
        self.lm_head = matrix(rngs, s.vocab, s.hidden)
        self.enorm, self.hnorm = Norm(s.hidden, s.eps), Norm(s.hidden, s.eps)
        self.eh_proj = matrix(rngs, s.hidden, 2 * s.hidden)
        self.mtp = Block(s, False, rngs)
        self.mtp_norm = Norm(s.hidden, s.eps)

    def __call__(
        self, token_BT: jax.Array, capacity_factor: float = 2.0
    ) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
        """Logits [B, T, V]; MTP logits [B, T - 1, V], of position t + 2 at t; loads of the MoE layers."""
        x, loads = self.embed_tokens[token_BT], []
        for layer in self.layers:
            x, load = layer(x, capacity_factor)
            loads += [] if load is None else [load]
        x = self.norm(x)
        following = self.embed_tokens[token_BT[:, 1:]]
        joined = jnp.concatenate([self.enorm(following), self.hnorm(x[:, :-1])], -1)
        y, load = self.mtp(linear(joined, self.eh_proj), capacity_factor)
        assert load is not None
        return linear(x, self.lm_head), linear(self.mtp_norm(y), self.lm_head), [*loads, load]

    @property
    def moe_layers(self) -> list[MoE]:
        return [block.mlp for block in [*self.layers, self.mtp] if isinstance(block.mlp, MoE)]

    def hf_tensors(self) -> dict[str, jax.Array]:
        """The checkpoint's tensors by their Hugging Face names."""
        tensors = {
            "model.embed_tokens.weight": self.embed_tokens[...],
            "model.norm.weight": self.norm.weight[...],
            "lm_head.weight": self.lm_head[...],
        }
        for number, block in enumerate([*self.layers, self.mtp]):
            tensors |= _block_tensors(f"model.layers.{number}", block)
        mtp = f"model.layers.{self.s.layers}"
        return tensors | {
            f"{mtp}.embed_tokens.weight": self.embed_tokens[...],
            f"{mtp}.enorm.weight": self.enorm.weight[...],
            f"{mtp}.hnorm.weight": self.hnorm.weight[...],
            f"{mtp}.eh_proj.weight": self.eh_proj[...],
            f"{mtp}.shared_head.norm.weight": self.mtp_norm.weight[...],
            f"{mtp}.shared_head.head.weight": self.lm_head[...],
        }


def _block_tensors(name: str, block: Block) -> dict[str, jax.Array]:
    attention, mlp = block.self_attn, block.mlp
    tensors = {
        f"{name}.{n}.weight": getattr(block, n).weight[...]
        for n in ("input_layernorm", "post_attention_layernorm")
    }
    norms = ("q_a_layernorm", "kv_a_layernorm")
    products = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    tensors |= {f"{name}.self_attn.{n}.weight": getattr(attention, n).weight[...] for n in norms}
    tensors |= {f"{name}.self_attn.{n}.weight": getattr(attention, n)[...] for n in products}
    parts = ("gate_proj", "up_proj", "down_proj")
    if isinstance(mlp, MLP):
        return tensors | {f"{name}.mlp.{n}.weight": getattr(mlp, n)[...] for n in parts}
    tensors[f"{name}.mlp.gate.weight"] = mlp.gate[...]
    tensors[f"{name}.mlp.gate.e_score_correction_bias"] = mlp.bias[...]
    for part, stacked in zip(parts, (mlp.experts_gate, mlp.experts_up, mlp.experts_down)):
        tensors[f"{name}.mlp.shared_experts.{part}.weight"] = getattr(mlp.shared_experts, part)[...]
        for expert, weight in enumerate(stacked[...]):
            tensors[f"{name}.mlp.experts.{expert}.{part}.weight"] = weight
    return tensors
