"""Tiny recorded checkpoints, loaded into models and driven through a step context.

The loader here reads safetensors in a few lines on purpose: these tests are about the models, and
the product's streaming loader has its own.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from safetensors.numpy import load_file

from jaxserve.layers.kv import StateBlocks, pool_layouts, state_layout
from jaxserve.layers.linear import Projections
from jaxserve.layers.step_context import QueryBlocks, StepContext
from jaxserve.mesh import Layout, make_mesh, rules, weight_sharding
from jaxserve.models import resolve

GOLDEN = Path(__file__).parent.parent / "golden"
FAMILIES = ("llama", "llama3_tied", "qwen2", "qwen3", "mistral", "gemma3")
MLA_FAMILIES = ("deepseek_v2_lite", "deepseek_v2", "deepseek_v3", "kimi_k2")
HYBRID_FAMILIES = ("minimax_text",)  # most layers keep a state instead of KV
MOE_FAMILIES = (
    *("mixtral", "qwen2_moe", "qwen3_moe", *MLA_FAMILIES, "minimax_m2", "glm4_moe", "gpt_oss"),
    *HYBRID_FAMILIES,
)


@dataclass(frozen=True)
class Golden:
    """What tools/make_golden.py recorded: per prompt its tokens, logits [T, V], greedy tokens, margins."""

    prompts: list[np.ndarray]
    logits: list[np.ndarray]
    greedy: np.ndarray
    margin: np.ndarray

    @classmethod
    def read(cls, family: str) -> "Golden":
        file = np.load(GOLDEN / family / "golden.npz")
        prompts = [row[row >= 0] for row in file["prompt_NT"]]
        ends = np.cumsum([len(prompt) for prompt in prompts])
        logits = np.split(file["logits_XV"], ends[:-1])
        return cls(prompts, logits, file["greedy_NO"], file["margin_NO"])


def load_tiny(family: str, dtype=jnp.float32) -> nnx.Module:
    """The recorded checkpoint of a family as a model with weights."""
    return build(read_config(family), read_tensors(family), dtype)


def read_config(family: str) -> dict[str, Any]:
    return json.loads((GOLDEN / family / "config.json").read_text())


def read_tensors(family: str) -> dict[str, np.ndarray]:
    return load_file(GOLDEN / family / "model.safetensors")


def build(config: dict[str, Any], tensors: dict[str, np.ndarray], dtype=jnp.float32) -> nnx.Module:
    model = resolve(config)(config, dtype)
    fill(model, tensors)
    return model


def fill(model: nnx.Module, tensors: dict[str, np.ndarray]) -> None:
    """Replaces every abstract parameter by its checkpoint tensors."""
    for _, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        sources = [tensors[name] for name in param.sources]
        array = param.assemble(*sources) if param.assemble else sources[0]
        want = param.get_value()
        param.set_value(jnp.asarray(array.reshape(want.shape), want.dtype))


@dataclass(frozen=True)
class Chunk:
    """Tokens of one sequence that a step computes, from position `start` on."""

    slot: int
    start: int
    tokens: np.ndarray


class TinyEngine:
    """Runs steps of decode rows and prefill chunks over a pool whose pages are in random order.

    `joined`: products of one input are one product, as they are on GPUs.
    """

    page_size, block_size = 8, 16
    num_slots, pages_per_slot = 6, 24

    def __init__(
        self,
        model: nnx.Module,
        *,
        layout: Layout | None = None,
        seed: int = 0,
        dtype=jnp.float32,
        joined: bool = False,
    ):
        self.ranks = layout.dp if layout else 1
        self.mesh = make_mesh(layout, jax.devices()) if layout else None
        self.num_pages = self.num_slots * self.pages_per_slot + 5
        self.layouts = pool_layouts(
            model.kv, model.num_q_heads, num_pages=self.num_pages, page_size=self.page_size, mesh=self.mesh
        )
        self.dtype, self.state_spec = dtype, getattr(model, "states", None)
        rng = np.random.default_rng(seed)
        used = self.num_slots * self.pages_per_slot
        tables = [rng.permutation(self.num_pages)[:used] for _ in range(self.ranks)]
        self.page_table = np.concatenate(tables).reshape(-1, self.pages_per_slot).astype(np.int32)
        self.structure, self.params = nnx.split(model)
        if layout:
            assert self.state_spec is None, "layouts of models with states are tested with the whole engine"
            heads = {"num_q_heads": model.num_q_heads, "num_kv_heads": model.kv.num_kv_heads}
            table = rules(layout, **heads)
            shardings = nnx.map_state(
                lambda path, param: param.replace(weight_sharding(self.mesh, table, param)), self.params
            )
            self.params = jax.device_put(self.params, shardings)
        if joined:
            model = nnx.merge(self.structure, self.params)
            for _, node in nnx.iter_graph(model):
                if isinstance(node, Projections):
                    node.fuse(self.mesh if self.mesh is not None and self.mesh.size > 1 else None)
            self.structure, self.params = nnx.split(model)
        self.forget()
        self._forward = jax.jit(
            self._trace, static_argnames=("has_rows", "has_prompts"), donate_argnums=(1, 2)
        )

    def forget(self) -> None:
        """Make the pools as they were; a page or state that was never written holds NaN, so that reading one
        shows."""
        self.pools = [jnp.full(shape, jnp.nan, self.dtype) for shape, _ in self.layouts]
        if self.mesh is not None:
            self.pools = [
                jax.device_put(pool, NamedSharding(self.mesh, spec))
                for pool, (_, spec) in zip(self.pools, self.layouts, strict=True)
            ]
        self.states = None
        if self.state_spec is not None:
            self.states = jnp.full(state_layout(self.state_spec, self.num_slots)[0], jnp.nan)

    def step(self, decode: list[list[Chunk]], prefill: list[list[Chunk]], R: int, P: int):
        """Runs one step; a list per rank. Returns each rank's logits [R + P, V], those of prompts from R on.

        In the step prompts follow the rows that are there, so that some of the first R tokens may be theirs.
        """
        ranks = [self._pack(d, p, R, P) for d, p in zip(decode, prefill, strict=True)]
        arrays = {name: np.concatenate([rank[name] for rank in ranks], axis=-1) for name in ranks[0]}
        arrays["page_table_SN"] = self.page_table
        static = {"has_rows": R > 0, "has_prompts": P > 0}
        logits, self.pools, self.states = self._forward(
            self.params, self.pools, self.states, arrays, **static
        )
        out = np.zeros(logits.shape, logits.dtype).reshape(self.ranks, R + P, -1)
        for rank, logits_TV in enumerate(np.split(np.asarray(logits), self.ranks)):
            rows, tokens = len(decode[rank]), sum(len(chunk.tokens) for chunk in prefill[rank])
            out[rank, :rows] = logits_TV[:rows]
            out[rank, R : R + tokens] = logits_TV[rows : rows + tokens]
        return list(out)

    def _trace(self, params, pools, states, arrays, has_rows, has_prompts):
        model = nnx.merge(self.structure, params)
        token_T, state_blocks = arrays.pop("token_T"), StateBlocks(*arrays.pop("state_rows"))
        blocks, context_len_R = QueryBlocks(*arrays.pop("blocks")), arrays.pop("context_len_R")
        step = StepContext(
            key_pages=pools[0],
            value_pages=pools[1],
            context_len_R=context_len_R if has_rows else None,
            blocks=blocks if has_prompts else None,
            block_size=self.block_size,
            num_pages=self.num_pages,
            page_size=self.page_size,
            mesh=self.mesh,
            states=states,
            state_blocks=state_blocks,
            **arrays,
        )
        logits_TV = self.logits(model, token_T, step)
        return logits_TV, [step.key_pages, step.value_pages], step.states

    def logits(self, model, token_T, step):
        """What a step gives."""
        return model.logits(model(token_T, step))

    def _pack(self, decode: list[Chunk], prefill: list[Chunk], R: int, P: int) -> dict[str, np.ndarray]:
        B = P // self.block_size + self.num_slots
        token, position = np.zeros(R + P, np.int32), np.zeros(R + P, np.int32)
        slot, context_len = np.full(R + P, -1, np.int32), np.zeros(R, np.int32)
        blocks, state_rows = np.zeros((4, B), np.int32), np.full((3, B), -1, np.int32)
        for row, chunk in enumerate(decode):
            token[row], position[row], slot[row] = chunk.tokens[0], chunk.start, chunk.slot
            context_len[row] = chunk.start + 1
        at, block = len(decode), 0
        for chunk in prefill:
            n = len(chunk.tokens)
            token[at : at + n], slot[at : at + n] = chunk.tokens, chunk.slot
            position[at : at + n] = chunk.start + np.arange(n)
            for first in range(0, n, self.block_size):
                length = min(self.block_size, n - first)
                blocks[:, block] = chunk.slot, at + first, length, chunk.start + first
                state_rows[0, block] = chunk.slot if chunk.start else -1
                block += 1
            state_rows[1, block - 1] = chunk.slot
            at += n
        assert at <= R + P
        return {
            "token_T": token,
            "position_T": position,
            "slot_T": slot,
            "context_len_R": context_len,
            "blocks": blocks,
            "state_rows": state_rows,
        }
