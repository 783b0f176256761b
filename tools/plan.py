"""Capacity and speed of layouts on paper:

    python -m tools.plan --model tools/shapes/deepseek-v3.json --gpu h100 --nodes 2 --compare tp,dpa,dpa+ep

A table with a row for each layout: KV capacity, the largest batch at a context, floors of a decode and
a prefill step, tokens/s. Then what data-parallel attention gains over tensor parallelism, cause by
cause, and every assumption. `--model` is a directory with a config.json, such a file, or a hub id in
the cache. Layout names: `tp`; `dpa` or `dpa4` (attention data-parallel over all, or 4, groups);
`ep` or `ep8` (experts over all, or 8, devices); `eplb32` (experts balanced, 32 redundant ones a layer);
joined by `+`.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxserve.check import DEFAULT_GPU, find_hf_config
from jaxserve.config import ConfigError, ServerConfig
from jaxserve.engine.blueprint import draw_on_paper
from jaxserve.layers.kv import LatentSpec
from jaxserve.ops.quantized_gemm import W8A8_MIN_ROWS
from jaxserve.roofline import DEVICES, GIB, Assumptions, Device, Step, find_device
from jaxserve.step_cost import StepCost
from jaxserve.weights import CheckpointError

CLAIMED_SPEEDUP = 5.0  # "up to 5x" of DP attention with EP over TP, in SGLang's data-parallelism guide
FAST_LATENT_FRACTION = 0.66  # of bf16 FLOP/s: FlashMLA reports 660 TFLOP/s on an H800


@dataclass(frozen=True)
class Setting:
    """What all rows of a table share."""

    device: Device
    num_devices: int
    devices_per_node: int
    context: int  # tokens of a sequence while it decodes; its mean length
    prompt: int
    chunk: int  # prompt tokens of a step on one dp rank
    assumed: Assumptions

    @property
    def num_nodes(self) -> int:
        return self.num_devices // self.devices_per_node

    def seconds(self, step: Step) -> float:
        return step.seconds(self.device, self.assumed, self.devices_per_node)


@dataclass(frozen=True)
class Row:
    """One layout that fits."""

    name: str
    cost: StepCost
    setting: Setting

    @property
    def pool_bytes(self) -> float:
        """Of KV on one device."""
        memory = self.setting.device.memory_bytes * self.cost.blueprint.mem_fraction
        return memory - self.cost.weight_bytes_of_device - self.cost.blueprint.state_bytes_of_device

    @property
    def kv_tokens(self) -> int:
        """Of the instance."""
        memory = self.setting.device.memory_bytes * self.cost.blueprint.mem_fraction
        return self.cost.kv_tokens_of_rank(memory) * self.cost.layout.dp

    @property
    def tokens_a_gib(self) -> float:
        """KV tokens of the instance for each GiB that every device gives to KV."""
        return GIB / self.cost.kv_bytes_of_token * self.cost.layout.dp

    @property
    def max_batch(self) -> int:
        """Sequences at `context` whose KV fits, and whose recurrent states do when there are any."""
        dp, blueprint = self.cost.layout.dp, self.cost.blueprint
        fits = self.kv_tokens // dp // self.setting.context
        return (fits if blueprint.states is None else min(fits, blueprint.num_slots)) * dp

    def decode(self, batch: float) -> Step:
        return self.cost.decode(batch / self.cost.layout.dp, self.setting.context)

    def tokens_per_s(self, batch: float) -> float:
        return batch / self.setting.seconds(self.decode(batch))

    @property
    def prefill(self) -> Step:
        return self.cost.prefill(self.setting.chunk, self.setting.prompt)

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.setting.chunk * self.cost.layout.dp / self.setting.seconds(self.prefill)


@dataclass(frozen=True)
class Refused:
    """A layout that the engine would refuse, or that has no room for KV."""

    name: str
    reason: str


def parse_layout(name: str, num_devices: int) -> dict[str, Any]:
    """The engine's keywords for a layout's name. Raises ConfigError."""
    keywords: dict[str, Any] = {"tp": num_devices}
    for part in name.split("+"):
        match = re.fullmatch(r"(tp|dpa|eplb|ep)(\d+)?", part)
        if match is None or (match[1] == "tp" and match[2]):
            raise ConfigError(f"compare={name!r}: use tp, dpa, dpaN, ep, epN, eplb, eplbN, joined by '+'")
        size = int(match[2] or num_devices)
        if match[1] == "dpa":
            keywords |= {"dp_size": size, "enable_dp_attention": True}
        elif match[1] == "ep":
            keywords["ep"] = size
        elif match[1] == "eplb":
            keywords |= {"enable_eplb": True, "ep_num_redundant_experts": int(match[2] or 0)}
    return keywords


def plan(
    model: str, names: Sequence[str], setting: Setting, server: dict[str, Any] | None = None
) -> list[Row | Refused]:
    """A row for each layout.

    Args:
        server: further keys of the server's configuration, such as mem_fraction_static.

    Raises: ConfigError or CheckpointError for what is wrong with every layout.
    """
    load = {"load_format": "dummy"} if Path(model).exists() and not Path(model).is_dir() else {}
    base = {"model_path": model, **load, **(server or {})}
    hf_config = find_hf_config(ServerConfig.from_keywords(**base))
    rows: list[Row | Refused] = []
    for name in names:
        keywords = parse_layout(name, setting.num_devices)
        try:
            config = ServerConfig.from_keywords(**base, **keywords)
            row = Row(name, StepCost(draw_on_paper(config, hf_config)), setting)
        except ConfigError as error:
            rows.append(Refused(name, str(error)))
            continue
        if row.max_batch < 1:
            used, limit = row.cost.weight_bytes_of_device / GIB, row.pool_bytes / GIB
            states = row.cost.blueprint.state_bytes_of_device
            also = f", recurrent states {states / GIB:.1f}" if states else ""
            reason = f"weights take {used:.1f} GiB a device{also}, {limit:.1f} GiB are left: no sequence fits"
            rows.append(Refused(name, reason))
            continue
        rows.append(row)
    return rows


# ---- what is printed ----


def table(rows: Sequence[Row | Refused]) -> Iterator[str]:
    yield (
        f"{'layout':<12}{'dp ep tp':>9}{'weights':>9}{'KV':>8}{'KV tokens':>13}{'batch':>8}{'decode':>9}"
        f"{'of it':>8}{'decode':>10}{'prefill':>9}{'prefill':>10}"
    )
    yield (
        f"{'':<12}{'':>9}{'GiB/dev':>9}{'GiB/dev':>8}{'of all':>13}{'of all':>8}{'ms/step':>9}"
        f"{'sending':>8}{'tok/s':>10}{'ms/step':>9}{'tok/s':>10}"
    )
    for row in rows:
        if isinstance(row, Refused):
            yield f"{row.name:<12}refused: {row.reason}"
            continue
        setting, step = row.setting, row.decode(row.max_batch)
        total = setting.seconds(step)
        sending = step.collective_s(setting.device, setting.assumed, setting.devices_per_node)
        yield (
            f"{row.name:<12}{'x'.join(map(str, row.cost.layout.shape)):>9}"
            f"{row.cost.weight_bytes_of_device / GIB:>9.1f}{row.pool_bytes / GIB:>8.1f}{row.kv_tokens:>13,}"
            f"{row.max_batch:>8,}{total * 1e3:>9.1f}{sending / total:>8.0%}{row.max_batch / total:>10,.0f}"
            f"{setting.seconds(row.prefill) * 1e3:>9.1f}{row.prefill_tokens_per_s:>10,.0f}"
        )


def collectives(rows: Sequence[Row | Refused]) -> Iterator[str]:
    yield "Sent by one device in a decode step at the largest batch:"
    for row in rows:
        if isinstance(row, Row):
            for c in row.decode(row.max_batch).collectives:
                off = c.bytes_off_node(row.setting.devices_per_node) / 1e6
                yield (
                    f"  {row.name:<10}{c.count:>4} x {c.kind:<15}over {c.size:<3}"
                    f"{c.bytes_sent / 1e6:>9.3f} MB each, {off:8.3f} MB to other nodes  ({c.name})"
                )
            if row.cost.blueprint.experts and row.cost.layout.ep > 1:
                yield (
                    f"  {row.name:<10}   a token's experts are on {row.cost.deduplicated:.0%} of "
                    f"{row.cost.layout.ep} devices: what an all-to-all without repeats moves of an all-gather"
                )


def gains(base: Row, row: Row) -> Iterator[str]:
    """What a layout gains over plain tensor parallelism, cause by cause."""
    a_gib = row.tokens_a_gib / base.tokens_a_gib
    net = row.kv_tokens / base.kv_tokens
    same = row.tokens_per_s(base.max_batch) / base.tokens_per_s(base.max_batch)
    total = row.tokens_per_s(row.max_batch) / base.tokens_per_s(base.max_batch)
    grown = total / same
    yield f"{row.name} against {base.name}:"
    yield (
        f"  KV capacity        {a_gib:5.2f}x for each GiB of KV (a token's KV is kept {base.name} "
        f"{_copies(base):g} times, {row.name} {_copies(row):g} times)"
    )
    yield (
        f"                     {net:5.2f}x in all: {row.cost.weight_bytes_of_device / GIB:.1f} instead of "
        f"{base.cost.weight_bytes_of_device / GIB:.1f} GiB a device go to weights"
    )
    yield f"  decode tokens/s    {total:5.2f}x, {row.max_batch} against {base.max_batch} sequences, of which"
    yield f"                     {same:5.2f}x at the same batch of {base.max_batch}, by what is read and sent"
    yield f"                     {grown:5.2f}x from the larger batch that the KV capacity allows"
    yield f"  prefill tokens/s   {row.prefill_tokens_per_s / base.prefill_tokens_per_s:5.2f}x"


def _kv_bytes_once(row: Row) -> float:
    """Of a token, kept once."""
    blueprint = row.cost.blueprint
    if isinstance(blueprint.model.kv, LatentSpec):
        return blueprint.page_bytes / blueprint.config.page_size
    kv = blueprint.model.kv
    return 2 * kv.num_layers * kv.num_kv_heads * kv.head_dim * row.cost.itemsize


def _copies(row: Row) -> float:
    """How many times a token's KV is kept in the instance."""
    return row.cost.kv_bytes_of_token * row.cost.layout.group / _kv_bytes_once(row)


def verdict(base: Row, best: Row) -> Iterator[str]:
    """What part of the claimed speed-up the arithmetic explains."""

    def speedup(**changes: float) -> float:
        pair = []
        for row in (best, base):
            setting = replace(row.setting, assumed=replace(row.setting.assumed, **changes))
            pair.append(replace(row, setting=setting).tokens_per_s(row.max_batch))
        return pair[0] / pair[1]

    def part(total: float) -> str:
        return f"{min(1, max(0, (total - 1) / (CLAIMED_SPEEDUP - 1))):.0%} of the gain"

    total, better = speedup(), speedup(latent_attention_fraction=FAST_LATENT_FRACTION)
    yield (
        f'"Up to {CLAIMED_SPEEDUP:g}x" (SGLang\'s guide, DP attention with EP over TP): bytes, operations '
        f"and links explain {total:.2f}x in decode for {best.name}, {part(total)};"
    )
    yield (
        f"{better:.2f}x, {part(better)}, with MLA kernels at {FAST_LATENT_FRACTION:g} of bf16 FLOP/s, as "
        "FlashMLA reports. Not in it: kernels below"
    )
    yield "their floor at small shapes, prompts that hold back decoding, padding, uneven experts."


def report(model: str, rows: Sequence[Row | Refused], setting: Setting) -> Iterator[str]:
    fits = [row for row in rows if isinstance(row, Row)]
    d = setting.device
    yield (
        f"{model} on {setting.num_nodes} x {setting.devices_per_node} {d.name}: "
        f"contexts of {setting.context}, prompts of {setting.prompt}, {setting.chunk} tokens a step and rank"
    )
    if fits:
        cost = fits[0].cost
        yield (
            f"{cost.num_params / 1e9:.1f} B parameters ({cost.active_params / 1e9:.1f} B a token), "
            f"{cost.weight_bytes / 1e9:.1f} GB of weights as declared; KV in {cost.blueprint.kv_dtype.name}: "
            f"{_kv_bytes_once(fits[0]):,.0f} bytes a token"
        )
        if cost.blueprint.states:
            each = cost.state_bytes_of_sequence * cost.layout.group
            slots, kept = cost.blueprint.num_slots, cost.blueprint.num_checkpoints
            yield (
                f"recurrent states in float32: {each / 2**20:,.1f} MiB a sequence, on each dp rank of "
                f"{slots} running requests and {kept} cached prefixes; they bound the batch"
            )
    yield ""
    yield from table(rows)
    yield ""
    yield from collectives(rows)
    base = next((row for row in fits if row.cost.layout.dp == row.cost.layout.ep == 1), None)
    if base is not None and len(fits) > 1:
        yield ""
        others = [row for row in fits if row is not base]
        for row in others:
            yield from gains(base, row)
        if isinstance(base.cost.blueprint.model.kv, LatentSpec):
            yield from verdict(base, max(others, key=lambda row: row.tokens_per_s(row.max_batch)))
    yield ""
    yield "Assumptions (change with --assume name=value):"
    yield (
        f"  {d.name}: {d.memory_bytes / GIB:.1f} GiB, {d.bandwidth / 1e12:g} TB/s, {d.bf16_flops / 1e12:g} "
        f"TFLOP/s bf16 ({d.fp8_flops / 1e12:g} fp8), {d.link / 1e9:g} GB/s to its node "
        f"and {d.network / 1e9:g} GB/s beyond, one way "
        "(data sheets)"
    )
    yield from (f"  {line}" for line in setting.assumed.lines())
    yield f"  float8 weights meet float8: of experts, and of dense layers from {W8A8_MIN_ROWS} rows on;"
    yield "  else they are multiplied in bfloat16, as int8 is"
    yield "  embedding rows are not counted, a tied head is"
    yield "  tokens choose experts evenly; work and collectives follow each other, nothing overlaps"
    yield "  prefill computes causal attention on half of the prompt, MLA absorbed, weights once a step"
    yield "  batch: all sequences at the context, none shares a prefix; max_running_requests is not applied"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.plan", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True, help="directory, config.json or cached hub id")
    parser.add_argument("--gpu", default=DEFAULT_GPU, help=", ".join(DEVICES))
    parser.add_argument("--device-memory-gb", type=float, help="memory of a device in 10^9 bytes")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--compare", default="tp,dpa,dpa+ep", help="layouts, separated by commas")
    parser.add_argument("--context", type=int, default=4096, help="mean tokens of a decoding sequence")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of a prompt")
    parser.add_argument("--chunk", type=int, default=2048, help="prompt tokens of a step and dp rank")
    parser.add_argument("--mem-fraction-static", type=float, help="of device memory, for weights and KV")
    parser.add_argument(
        "--dequantize-weights", action="store_true", help="float8 and MXFP4 weights as bfloat16"
    )
    parser.add_argument(
        "--quantization", choices=("fp8", "int8", "mxfp4"), help="of weights, as the server's"
    )
    parser.add_argument(
        "--kv-cache-dtype", choices=("auto", "bfloat16", "fp8_e4m3"), default="auto", help="of the KV cache"
    )
    parser.add_argument("--assume", action="append", default=[], metavar="NAME=VALUE")
    args = parser.parse_args(argv)
    try:
        for name in ("nodes", "gpus_per_node", "context", "prompt", "chunk"):
            if getattr(args, name) < 1:
                raise ConfigError(f"{name}={getattr(args, name)} is too small; 1 is the least")
        device = find_device(args.gpu)
        if args.device_memory_gb is not None:
            device = replace(device, memory_bytes=int(args.device_memory_gb * 1e9))
        setting = Setting(
            device=device,
            num_devices=args.nodes * args.gpus_per_node,
            devices_per_node=args.gpus_per_node,
            context=args.context,
            prompt=args.prompt,
            chunk=args.chunk,
            assumed=Assumptions().changed(args.assume),
        )
        server = {
            "mem_fraction_static": args.mem_fraction_static,
            "dequantize_weights": args.dequantize_weights,
            "quantization": args.quantization,
            "kv_cache_dtype": args.kv_cache_dtype,
        }
        rows = plan(args.model, args.compare.split(","), setting, server)
        print("\n".join(report(args.model, rows, setting)))
    except (ConfigError, CheckpointError, json.JSONDecodeError) as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
