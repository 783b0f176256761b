"""What a step of a model on a layout reads, computes and sends, counted from its declared weights.

Shapes, logical axes and sharding rules are the engine's own, so a new family needs nothing here.
The collectives are those the engine runs: sums after projections whose input is split, and what
expert dispatch sends. `tools.collectives` compares them with compiled programs.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx

from jaxserve.engine.blueprint import Blueprint
from jaxserve.layers.channel_quant import ChannelScaled
from jaxserve.layers.kv import LatentSpec
from jaxserve.layers.lightning import LightningAttention
from jaxserve.layers.moe import MoE
from jaxserve.layers.quant import BlockScaled
from jaxserve.mesh import AXES, GROUP, weight_sharding
from jaxserve.ops.quantized_gemm import takes_float8
from jaxserve.parallel.dispatch import Exchange
from jaxserve.parallel.links import RANKS, LinkPlan
from jaxserve.roofline import Collective, Step, Work, destinations_reached, experts_touched

Part = Literal["dense", "expert", "head", "embedding"]


@dataclass(frozen=True)
class Weight:
    """A declared weight: its part in the model, and what one device of the layout has of it."""

    part: Part
    num_params: int  # whole
    num_bytes: float  # whole
    local_params: int
    local_bytes: float
    is_matrix: bool  # else a norm, a bias or scales: no multiplications to speak of
    is_float8: bool  # may meet activations in float8
    sums_over_group: bool  # its product is a partial sum on each device of the attention group


class StepCost:
    """Of a blueprint."""

    def __init__(self, blueprint: Blueprint):
        self.blueprint = blueprint
        self.layout = blueprint.layout
        model = blueprint.model
        self.hidden, self.top_k, self.windows = _hidden(model), _top_k(model), _windows(model)
        nodes = [node for _, node in nnx.iter_graph(model)]
        scaled = {id(node.numbers) for node in nodes if isinstance(node, ChannelScaled)}
        scaled |= {id(node.numbers) for node in nodes if isinstance(node, BlockScaled) and node.has_kernels}
        self.weights = [_weight(blueprint, p, id(p) in scaled) for p in _params(model)]
        self.itemsize = jnp.dtype(blueprint.dtype).itemsize
        self.links = self._links()
        self.kv_bytes_of_token = blueprint.page_bytes_of_device / blueprint.config.page_size

    # ---- memory ----

    @property
    def num_params(self) -> int:
        """Of the model; redundant experts are not counted."""
        return sum(round(w.num_params * self._unique(w)) for w in self.weights)

    @property
    def active_params(self) -> float:
        """That a token is multiplied with: its experts' share, and no embedding."""
        experts = self.blueprint.experts
        share = self.top_k / experts.num_slots if experts else 0
        return sum(
            w.num_params * (share if w.part == "expert" else 1)
            for w in self.weights
            if w.is_matrix and w.part != "embedding"
        )

    def _unique(self, weight: Weight) -> float:
        """What is not redundant."""
        experts = self.blueprint.experts
        return experts.num_experts / experts.num_slots if experts and weight.part == "expert" else 1

    @property
    def redundant_bytes_of_device(self) -> float:
        return sum(w.local_bytes * (1 - self._unique(w)) for w in self.weights)

    @property
    def weight_bytes(self) -> float:
        """Of one copy of the model; redundant experts are not counted."""
        return sum(w.num_bytes * self._unique(w) for w in self.weights)

    @property
    def weight_bytes_of_device(self) -> float:
        return sum(w.local_bytes for w in self.weights)

    def kv_tokens_of_rank(self, memory_bytes: float) -> int:
        """KV tokens of one dp rank, when weights, states and KV may take `memory_bytes` of each device."""
        left = memory_bytes - self.weight_bytes_of_device - self.blueprint.state_bytes_of_device
        return max(0, int(left // self.kv_bytes_of_token))

    @property
    def state_bytes_of_sequence(self) -> float:
        """What recurrent layers keep of a sequence on one device of its attention group."""
        states = self.blueprint.states
        if states is None:
            return 0
        return states.num_layers * states.num_heads / self.layout.group * states.head_dim**2 * 4

    def workspace_bytes(self, tokens: int, samples: int) -> float:
        """An estimate: residual stream, the widest inner activations, logits, and sampling state of slots.

        It must fit into what weights and KV leave; the compiler's own figure is known only after
        compiling.
        """
        blueprint = self.blueprint
        widest = max(w.local_params / self.hidden for w in self.weights if w.is_matrix and w.part == "dense")
        inner = 3 * widest * tokens
        if experts := blueprint.experts:
            params = sum(w.num_params for w in self.weights if w.part == "expert")
            ffn = params / (3 * experts.num_layers * experts.num_slots * self.hidden)
            # Rows go in, between and out; every expert may have a block that is not full.
            rows = tokens * self.layout.dp * self.top_k / self.layout.num_devices
            rows += 128 * experts.num_slots / self.layout.ep
            inner = max(inner, rows * (2 * self.hidden + ffn)) + tokens * self.layout.dp * self.hidden
        if states := blueprint.states:  # before, added by and after each block of a prompt, a layer at a time
            blocks = tokens / 128 + 32
            inner += 3 * blocks * self.state_bytes_of_sequence / states.num_layers / self.itemsize
        stream = 4 * tokens * self.hidden
        slots = blueprint.num_slots * blueprint.model.vocab_size
        return (stream + inner) * self.itemsize + samples * blueprint.model.vocab_size * 4 * 3 + slots * 3

    # ---- steps ----

    def decode(self, rows: float, context: float) -> Step:
        """`rows` sequences a dp rank, each attending `context` tokens."""
        pairs = [rows * min(context, window or context) for window in self.windows]
        latent = isinstance(self.blueprint.model.kv, LatentSpec)
        layer_bytes = self.kv_bytes_of_token / len(self.windows)
        attention = Work(
            "KV and attention",
            sum(pairs) * layer_bytes,
            sum(pairs) * self._flops_of_pair,
            "latent_attention" if latent else "gemm",
        )
        return self._step(rows, rows, attention)

    def prefill(self, tokens: float, prompt: float) -> Step:
        """`tokens` a dp rank, of prompts `prompt` tokens long; a token attends half of its prompt."""
        pairs = [tokens * min(prompt / 2, window or prompt) for window in self.windows]
        latent = isinstance(self.blueprint.model.kv, LatentSpec)
        attention = Work(
            "KV and attention",
            tokens * self.kv_bytes_of_token,
            sum(pairs) * self._flops_of_pair,
            "latent_attention" if latent else "prefill_attention",
        )
        return self._step(tokens, tokens / prompt, attention)

    @property
    def _flops_of_pair(self) -> float:
        """One query token with one token of its context, in one layer on one device."""
        model = self.blueprint.model
        heads = model.num_q_heads / self.layout.group
        if isinstance(model.kv, LatentSpec):  # absorbed: scores over latent and rope part, values are latents
            return 2 * heads * (2 * model.kv.latent_dim + model.kv.rope_dim)
        return 4 * heads * model.kv.head_dim

    def _step(self, tokens: float, samples: float, attention: Work) -> Step:
        works = [*self._dense(tokens), attention]
        if states := self.blueprint.states:
            # Read and written once a sequence; a token adds a product to the state and takes one from it.
            a_token = 4 * states.num_layers * states.num_heads / self.layout.group * states.head_dim**2
            num_bytes = 2 * samples * self.state_bytes_of_sequence
            works.append(Work("recurrent states", num_bytes, tokens * a_token))
        experts = self.blueprint.experts
        if experts:
            every = tokens * self.layout.dp
            ours = [w for w in self.weights if w.part == "expert"]
            touched = experts_touched(experts.num_slots, self.top_k, every)
            params = sum(w.local_params for w in ours)
            flops = 2 * every * self.top_k / experts.num_slots * params
            kind = "fp8_gemm" if self.itemsize == 2 and any(w.is_float8 for w in ours) else "gemm"
            works.append(Work("experts", touched * sum(w.local_bytes for w in ours), flops, kind))
        head = [w for w in self.weights if w.part == "head"]
        works.append(
            Work("head", sum(w.local_bytes for w in head), 2 * samples * sum(w.local_params for w in head))
        )
        return Step(tuple(works), tuple(self.collectives(tokens, samples)))

    def _dense(self, tokens: float) -> list[Work]:
        """Products of float8 on both sides are a work of their own: they run at another rate."""
        every = [w for w in self.weights if w.part == "dense"]
        float8 = [w for w in every if w.is_float8]
        if not takes_float8(tokens * self.layout.dp, self.blueprint.dtype, jnp.float8_e4m3fn):
            float8 = []
        rest = [w for w in every if not w.is_float8] if float8 else every

        def work(name: str, weights: list[Weight], kind: Literal["gemm", "fp8_gemm"] = "gemm") -> Work:
            flops = 2 * tokens * sum(w.local_params for w in weights if w.is_matrix)
            return Work(name, sum(w.local_bytes for w in weights), flops, kind)

        return [
            work("dense weights", rest),
            *([work("dense weights in float8", float8, "fp8_gemm")] if float8 else []),
        ]

    # ---- collectives ----

    def collectives(self, tokens: float, samples: float) -> list[Collective]:
        """What one device takes part in, in a step of `tokens` a dp rank of which `samples` are sampled from.

        Of a draw without filters three numbers a row are gathered, of greedy rows alone each device's best.
        For filters, and where the group does not divide the vocabulary, whole rows of logits are.
        """
        group, out = self.layout.group, []
        row = self.hidden * self.itemsize
        if group > 1:
            sums = sum(w.sums_over_group for w in self.weights)
            out.append(self._sum("sums in the group", sums, tokens))
            if norms := self._norms_over_heads():
                out.append(Collective("norms over heads", "all_reduce", norms, group, 1, tokens * 4))
            out.append(self._sum("embedding", 1, tokens))
            vocabulary = self.blueprint.model.vocabulary
            if vocabulary.size % group:
                logits = samples * vocabulary.embedding.get_value().shape[0] * 4
                out.append(Collective("logits", "all_gather", 1, group, 1, logits))
            else:
                by_kernel = self.links is not None and self.links.takes(
                    math.ceil(samples), jnp.float32, GROUP
                )
                out.append(Collective("draws", "all_gather", 3, group, 1, samples * group * 4, by_kernel))
        if self.blueprint.experts and self.layout.num_devices > 1:
            out += self._dispatch(self.blueprint.experts.num_layers, tokens, row)
        return out

    def _links(self) -> LinkPlan | None:
        """What an engine would exchange by, whose GPUs reach each other's memory."""
        config = self.blueprint.config
        by_xla = config.disable_custom_all_reduce or self.blueprint.two_batches or config.nnodes > 1
        return None if by_xla or self.blueprint.on_cpu else LinkPlan.on_paper(self.layout.shape)

    def _sum(self, name: str, count: int, tokens: float) -> Collective:
        """`count` sums of rows over the group."""
        links, num = self.links, math.ceil(tokens) * self.hidden
        by_kernel = links is not None and links.exchanges(num, self.blueprint.dtype, GROUP) > 0
        payload = tokens * self.hidden * self.itemsize
        return Collective(name, "all_reduce", count, self.layout.group, 1, payload, by_kernel)

    def _norms_over_heads(self) -> int:
        """Norms over all heads of a layer, which lie on the devices of a group."""
        nodes = [node for _, node in nnx.iter_graph(self.blueprint.model)]
        layers = sum(getattr(n, "norm_over", None) == "layer" and n.q_norm is not None for n in nodes)
        lightning = sum(isinstance(n, LightningAttention) for n in nodes)
        return layers * (2 if self.blueprint.table["kv_heads"] else 1) + lightning

    def _joined_sums(self) -> int:
        """Layers in which one all-reduce sums the experts' results and the shared expert's.

        On a GPU, where the two are just added: XLA's AllReduceReassociate adds first and sums then. It
        does not go past a gate, a gather or the end of a branch, and is no part of XLA for CPUs.
        """
        if self.blueprint.on_cpu:
            return 0
        nodes = (node for _, node in nnx.iter_graph(self.blueprint.model) if isinstance(node, MoE))
        return sum(node.shared is not None and node.shared_gate is None for node in nodes)

    def _dispatch(self, layers: int, tokens: float, row: float) -> list[Collective]:
        layout = self.layout
        sizes: dict[str, int] = dict(zip(AXES, layout.shape))
        routing = self.top_k * 8  # an id and a weight a choice
        backend = self.blueprint.expert_backend
        ragged = backend == "ragged"
        exchange = Exchange.plan(max(1, math.ceil(tokens)), self.top_k, sizes, ragged)
        if backend in ("all_to_all", "ragged") or (backend == "auto" and exchange.is_worth_it):
            e, tp = exchange.num_destinations, sizes["tp"]
            sent: float = e * exchange.capacity
            if ragged and not self.blueprint.on_cpu:
                sent *= destinations_reached(self.top_k, e)
            has_fallback = exchange.capacity < exchange.share
            out = [
                Collective("tokens to experts", "all_to_all", layers, e, tp, sent * (row + routing)),
                Collective("results back", "all_to_all", layers, e, tp, sent * row),
            ]
            if ragged:
                out.append(Collective("how many come", "all_to_all", layers, e, tp, e * 4))
            if has_fallback:
                out.append(Collective("is there room", "all_reduce", layers, layout.num_devices, 1, 4))
            joined = 0 if has_fallback or sizes["ep"] > 1 else self._joined_sums()
            if tp > 1 and (sums := layers - joined):
                out.append(Collective("sums over tp", "all_reduce", sums, tp, 1, exchange.share * row))
            if sizes["ep"] > 1:
                out.append(
                    Collective(
                        "shares of a rank",
                        "all_gather",
                        layers,
                        sizes["ep"],
                        tp,
                        sizes["ep"] * exchange.share * row,
                    )
                )
            return out
        out = []
        if layout.dp > 1:
            every, message = tokens * layout.dp, math.ceil(tokens) * self.hidden
            by_kernel = self.links is not None and self.links.takes(message, self.blueprint.dtype, RANKS)
            ranks = layers, layout.dp, layout.group
            out = [
                Collective("tokens to all", "all_gather", *ranks, every * (row + routing), by_kernel),
                Collective("results back", "reduce_scatter", *ranks, every * row, by_kernel),
            ]
        if layout.group > 1 and (sums := layers - self._joined_sums()):
            out.append(self._sum("sums of experts", sums, tokens))
        return out

    @property
    def deduplicated(self) -> float:
        """What a de-duplicated all-to-all moves of an all-gather's bytes, with evenly spread choices."""
        dp, ep, _ = self.layout.shape
        return destinations_reached(self.top_k, dp * ep)


def _params(model: nnx.Module) -> list[nnx.Param]:
    return [node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Param)]


def _weight(blueprint: Blueprint, param: nnx.Param, meets_float8: bool) -> Weight:
    value, axes = param.get_value(), param.logical
    sharding = weight_sharding(blueprint.mesh, blueprint.table, param)
    local, whole = math.prod(sharding.shard_shape(value.shape)), math.prod(value.shape)
    itemsize = jnp.dtype(value.dtype).itemsize
    is_scale = param.is_scale
    is_matrix = len(axes) >= 2 and not is_scale
    vocabulary = blueprint.model.vocabulary
    part: Part = "dense"
    if "expert" in axes:
        part = "expert"
    elif "vocab" in axes:
        part = "head" if vocabulary.head is None or param is vocabulary.head else "embedding"
    split = {axis for axis in axes[1:] if axis and set(blueprint.table[axis]) & set(GROUP)}
    sums = part == "dense" and is_matrix and axes[0] == "embed" and bool(split)
    count = 0 if is_scale else 2 if value.dtype == jnp.uint8 else 1  # MXFP4: two in a byte
    is_float8 = (meets_float8 or part == "expert") and value.dtype == jnp.float8_e4m3fn
    return Weight(
        part=part,
        num_params=whole * count,
        num_bytes=whole * itemsize,
        local_params=local * count,
        local_bytes=local * itemsize,
        is_matrix=is_matrix,
        is_float8=is_float8,
        sums_over_group=sums,
    )


def _hidden(model: Any) -> int:
    return model.vocabulary.embedding.get_value().shape[1]


def _top_k(model: nnx.Module) -> int:
    return next(
        (n.routing.top_k for _, n in nnx.iter_graph(model) if hasattr(getattr(n, "routing", None), "top_k")),
        0,
    )


def _windows(model: Any) -> list[int | None]:
    """Tokens that each layer attends at most; None is all."""
    nodes = [node for _, node in nnx.iter_graph(model) if hasattr(node, "layer") and hasattr(node, "window")]
    by_layer = {node.layer: node.window for node in nodes}
    return [by_layer.get(layer) for layer in range(model.kv.num_layers)]
