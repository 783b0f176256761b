"""What compiled steps send between devices, beside what the plan forecasts:

    python -m tools.collectives --model tests/golden/deepseek_v3 --compare tp,dpa,dpa+ep

For each layout an engine with random weights is compiled, on virtual CPU devices or on the GPUs that
are here, and the collectives of a decode and of a mixed step are read from its programs. One line for
each kind and group: bytes that one device sends. The exit status is 1 where the two differ: weights or
KV that are gathered would show here. Layout names are those of `tools.plan`.

Bytes are those of ring algorithms, and collectives all XLA's, also where GPUs would exchange small
arrays by the kernel of `jaxserve.ops.peer_exchange`.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve.check import find_hf_config
from jaxserve.config import ConfigError, ServerConfig
from jaxserve.engine.batch import Bucket
from jaxserve.engine.blueprint import draw_on_paper
from jaxserve.engine.build import build, prepare_devices
from jaxserve.engine.programs import RANDOM
from jaxserve.engine.runner import Runner
from jaxserve.parallel.compiled import bytes_by_group, collectives
from jaxserve.step_cost import StepCost
from jaxserve.weights import CheckpointError
from tools.plan import parse_layout

Group = tuple[str, int, int]  # kind, devices, how far apart they lie


@dataclass(frozen=True)
class Comparison:
    """Of one step shape: bytes that one device sends, by group."""

    bucket: Bucket
    forecast: dict[Group, float]
    compiled: dict[Group, float]

    @property
    def agrees(self) -> bool:
        return self.forecast == self.compiled


def compare(runner: Runner, cost: StepCost) -> list[Comparison]:
    """Every step shape of a compiled engine, sampled at random."""
    out = []
    for bucket in runner.buckets:
        tokens, samples = bucket.num_tokens, bucket.num_samples
        programs = (bucket, (samples, RANDOM))
        sent = [c for program in programs for c in collectives(runner.hlo(program))]
        forecast = bytes_by_group(cost.collectives(tokens, samples))
        out.append(Comparison(bucket, forecast, bytes_by_group(sent)))
    return out


def lines(name: str, shape: tuple[int, int, int], found: Sequence[Comparison]) -> Iterator[str]:
    for one in found:
        step = f"{one.bucket.num_tokens} tokens a rank, {one.bucket.rows} of them rows"
        yield f"{name} ({'x'.join(map(str, shape))}), {step}: {'agree' if one.agrees else 'DIFFER'}"
        for group in sorted(one.forecast.keys() | one.compiled.keys()):
            kind, size, stride = group
            forecast, compiled = one.forecast.get(group, 0), one.compiled.get(group, 0)
            mark = "" if forecast == compiled else "  <--"
            yield (
                f"  {kind:<15}over {size:<3}{stride:>3} apart  forecast {forecast:>14,.0f} B"
                f"  compiled {compiled:>14,.0f} B{mark}"
            )


def run(model: str, name: str, num_devices: int, options: dict[str, Any]) -> bool:
    """Prints one layout; whether all its steps agree."""
    keywords = {**options, "model_path": model, **parse_layout(name, num_devices)}
    config = ServerConfig.from_keywords(**keywords)
    on_cpu = config.device == "cpu"
    cost = StepCost(draw_on_paper(config, find_hf_config(config), on_cpu))
    prepare_devices(config)
    found = compare(build(config, lambda _: None).runner, cost)
    print("\n".join(lines(name, cost.layout.shape, found)), flush=True)
    return all(one.agrees for one in found)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.collectives",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="directory with a config.json, or such a file")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compare", default="tp,dpa,dpa+ep", help="layouts, separated by commas")
    parser.add_argument("--moe-a2a-backend", help="how tokens reach experts")
    parser.add_argument("--layers", type=int, help="of the model, instead of all")
    parser.add_argument("--dtype", default="float32", help="a CPU sums others in float32, and so sends more")
    parser.add_argument("--rows", type=int, default=8, help="decode rows of a dp rank")
    parser.add_argument("--chunk", type=int, default=64, help="prompt tokens of a mixed step on a dp rank")
    args = parser.parse_args(argv)
    options = {
        "device": args.device,
        "dtype": args.dtype,
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_running_requests": args.rows,
        "chunked_prefill_size": args.chunk,
        "max_total_tokens": 4096,
        "moe_a2a_backend": args.moe_a2a_backend,
        "disable_custom_all_reduce": True,  # only XLA's collectives can be read from a program
        "log_level": "warning",
    }
    try:
        with tempfile.TemporaryDirectory() as directory:
            model = args.model
            if args.layers is not None:
                model = _with_layers(Path(args.model), args.layers, Path(directory))
            agree = [run(model, name, args.devices, options) for name in args.compare.split(",")]
    except (ConfigError, CheckpointError, OSError, json.JSONDecodeError) as error:
        print(f"collectives: {error}", file=sys.stderr)
        return 2
    return 0 if all(agree) else 1


def _with_layers(model: Path, num_layers: int, directory: Path) -> str:
    """A copy of the model's configuration with another number of layers."""
    file = model / "config.json" if model.is_dir() else model
    config = {**json.loads(file.read_text()), "num_hidden_layers": num_layers}
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


if __name__ == "__main__":
    sys.exit(main())
