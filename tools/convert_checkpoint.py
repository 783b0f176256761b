"""Convert a checkpoint to orbax, with config and tokenizer beside it.

    python -m tools.convert_checkpoint --from DIR|FILE.gguf|OWNER/NAME --to DIR [--verify] [--dtype D]
        [--quantization fp8|int8]

Streams one item (a layer, or one tensor outside the layers) at a time. An interrupted run
continues at the first incomplete item when the command is given again; until the manifest is
written, last, the directory is not taken for a checkpoint. `--verify` reads source and result again
and compares every tensor by hash. `--dtype auto` keeps every tensor's own dtype, and the model's
(bfloat16 where the file names none) for quantised ones; integers in groups (AWQ, GPTQ,
compressed-tensors) become codes of a byte with float32 scales, or with act-order are widened.
`--quantization fp8|int8` writes the linear weights as a server with that flag would make them, half
the bytes to store and to read.

Peak resident memory, above the 0.2 GiB of a Python with orbax (2 cores, 2026-11-24, largest tensor
512 MiB as bf16): 1.4 GiB for 2.75 GiB of bf16 safetensors, 2.9 times the largest tensor; 1.9 GiB for
a Q8_0 GGUF, which passes through float32, 3.9 times. The size of the checkpoint does not matter;
layers beyond 1 GiB are cut into several items.
"""

import argparse
import fcntl
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from jaxserve.config import ConfigError, ServerConfig
from jaxserve.engine.blueprint import draw_on_paper
from jaxserve.layers.channel_quant import Scheme
from jaxserve.layers.group_quant import SCALES
from jaxserve.layers.weight import Stacked
from jaxserve.weights import Checkpoint, CheckpointError, open_checkpoint
from jaxserve.weights.checkpoint import DTYPES, read_json
from jaxserve.weights.declared import declared
from jaxserve.weights.fill import SCALE_SUFFIXES
from jaxserve.weights.grouped import GroupedCheckpoint
from jaxserve.weights.orbax import (
    BEGUN,
    ITEMS,
    MANIFEST,
    OrbaxCheckpoint,
    item_record,
    tensor_hash,
    write_item,
    write_json,
    write_manifest,
)
from jaxserve.weights.quantised import QuantisedCheckpoint

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
# A layer of more bytes (one with many experts) becomes several items, so that memory stays bounded.
MAX_ITEM_BYTES = 1 << 30

_LAYER = re.compile(r"(.*?\blayers\.\d+)\.")
_CONVERTIBLE = ("float16", "bfloat16", "float32", "float64")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.convert_checkpoint",
        description="Convert a checkpoint to orbax, with config and tokenizer beside it.",
        epilog="An interrupted conversion continues when the same command is given again.",
    )
    parser.add_argument("--from", dest="source", required=True, help="directory, GGUF file or hub id")
    parser.add_argument("--to", dest="target", required=True, type=Path, help="directory to write")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--verify", action="store_true", help="compare the result with the source by hash")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "bfloat16", "float16", "float32"),
        help="default: as stored",
    )
    parser.add_argument(
        "--quantization",
        choices=("fp8", "int8"),
        help="write linear weights in 8 bits with a scale a channel",
    )
    args = parser.parse_args(argv)
    console = Console(stderr=True)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax's, which tells of what it raises too
    try:
        source = open_checkpoint(args.source, revision=args.revision)
        if isinstance(source, GroupedCheckpoint):
            source = source.in_form("wide" if args.quantization or source.is_ordered else "codes")
        if args.quantization:
            source = QuantisedCheckpoint(source, linear_weights(source, args.quantization), args.quantization)
        with _progress(console) as progress:
            done = convert(source, args.target, args.dtype, progress)
        console.print(f"{args.target}: {done}", markup=False)
        if args.verify:
            with _progress(console) as progress:
                wrong = verify(source, args.target, args.dtype, progress)
            for line in wrong:
                console.print(f"error: {line}", markup=False)
            if wrong:
                return 1
            console.print(f"{args.target}: every tensor equals the source", markup=False)
    except (CheckpointError, ConfigError, OSError) as error:
        console.print(f"error: {error}", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; give the same command again to continue")
        return 130
    return 0


def convert(source: Checkpoint, target: Path, dtype: str, progress: Progress) -> str:
    """Write or complete the conversion of `source` in `target`; says in words what was done.

    Raises: CheckpointError when `target` holds anything else.
    """
    described = describe(source, dtype)
    dtypes = target_dtypes(source, dtype)
    plan = plan_items(source, dtypes)
    with _owned(target):
        if (target / MANIFEST).exists():
            _refuse_other(target, read_json(target / MANIFEST).get("source"), described)
            return "already converted"
        resumed = _begin(target, described)
        bar = progress.add_task("converting", total=sum(size for _, _, size in plan), item="")
        items, kept = {}, 0
        for item, names, size in plan:
            progress.update(bar, item=item)
            record = item_record(target, item)
            if record is None or set(record) != set(names):
                arrays = {name: read_as(source, name, dtypes[name]) for name in names}
                write_item(target, item, arrays)
                record = item_record(target, item)
                del arrays
            else:
                kept += 1
            items[item] = record
            progress.update(bar, advance=size)
        write_files(source, target, dtype)
        write_manifest(target, described, items)
        (target / BEGUN).unlink(missing_ok=True)
    count = sum(len(record) for record in items.values())
    return f"{count} tensors in {len(items)} items" + (f", {kept} of them from before" if resumed else "")


def verify(source: Checkpoint, target: Path, dtype: str, progress: Progress) -> list[str]:
    """One line for every tensor of `target` that is not the source's; [] when all are equal."""
    result = OrbaxCheckpoint(target)
    wrong = [
        f"tensor {name} is missing from {target}" for name in source.tensors if name not in result.tensors
    ]
    wrong += [
        f"tensor {name} is not in {source.path}" for name in result.tensors if name not in source.tensors
    ]
    dtypes = target_dtypes(source, dtype)
    both = [name for name in source.tensors if name in result.tensors]
    bar = progress.add_task("verifying", total=sum(result.tensors[n].num_bytes for n in both), item="")
    for name in both:
        progress.update(bar, item=name)
        expected = read_as(source, name, dtypes[name])
        try:
            got = result.read(name)
        except CheckpointError as error:
            wrong.append(str(error))
            continue
        if (got.dtype, got.shape) != (expected.dtype, expected.shape):
            wrong.append(
                f"tensor {name} is {got.dtype} {list(got.shape)}, "
                f"expected {expected.dtype} {list(expected.shape)}"
            )
        elif tensor_hash(got) != tensor_hash(expected):
            wrong.append(f"tensor {name} {list(got.shape)} differs from {source.tensors[name].file}")
        progress.update(bar, advance=got.nbytes)
    return wrong


# ---- what is written ----


def linear_weights(source: Checkpoint, scheme: Scheme) -> list[str]:
    """The matrices that an engine with `--quantization` would quantise.

    Raises: ConfigError for a model that is not served, is quantised already, or whose matrices have the
    inputs first.
    """
    config = ServerConfig.from_keywords(model_path=str(source.path), quantization=scheme)
    names: list[str] = []
    for weight in declared(draw_on_paper(config, source.config).model):
        if len(weight.targets) > 1:
            if weight.param.assemble not in (None, Stacked()):
                raise ConfigError(
                    f"quantization={scheme}: {weight.param.sources[0]} is not stored as [out, in]; quantise "
                    "this model when it is loaded, with the server's --quantization"
                )
            names += weight.param.sources
    return names


def plan_items(source: Checkpoint, dtypes: Mapping[str, np.dtype]) -> list[tuple[str, list[str], int]]:
    """(item, its tensors, bytes to write), one a layer and one a tensor outside the layers."""
    groups: dict[str, list[str]] = {}
    for name in source.tensors:
        match = _LAYER.match(name)
        groups.setdefault(match[1] if match else name, []).append(name)
    plan = []
    for group, names in groups.items():
        parts: list[tuple[list[str], int]] = []
        for name in names:
            size = source.tensors[name].num_bytes
            size = size // source.tensors[name].dtype.itemsize * dtypes[name].itemsize
            if not parts or parts[-1][1] + size > MAX_ITEM_BYTES:
                parts.append(([], 0))
            parts[-1] = ([*parts[-1][0], name], parts[-1][1] + size)
        for number, (part, size) in enumerate(parts):
            plan.append((group if len(parts) == 1 else f"{group}.part{number}", part, size))
    return plan


def target_dtypes(source: Checkpoint, dtype: str) -> dict[str, np.dtype]:
    """What each tensor is written in: `dtype`, or with "auto" its own.

    What a model reads in float32 whatever its dtype (scales, biases of a router's choice) stays as it is.
    """
    wide = _read_wide(source) if dtype != "auto" else set()
    is_quantised = getattr(source, "is_quantised", None)

    def target(name: str) -> np.dtype:
        stored = source.tensors[name].dtype
        if stored.name not in _CONVERTIBLE or name.endswith((*SCALE_SUFFIXES, SCALES)) or name in wide:
            return stored  # integers and fp8 mean something only as they are
        if dtype != "auto":
            return DTYPES[dtype]
        if is_quantised is not None and is_quantised(name):
            return DTYPES[source.config.get("torch_dtype") or source.config.get("dtype") or "bfloat16"]
        return stored

    return {name: target(name) for name in source.tensors}


def _read_wide(source: Checkpoint) -> set[str]:
    """Tensors that a server in bfloat16 has in float32; none of a model that is not served."""
    config = ServerConfig.from_keywords(model_path=str(source.path), dtype="bfloat16")
    try:
        model = draw_on_paper(config, source.config).model
    except ConfigError:
        return set()
    params = [weight.param for weight in declared(model)]
    return {name for p in params if p.get_raw_value().dtype == np.float32 for name in p.sources}


def read_as(source: Checkpoint, name: str, want: np.dtype) -> np.ndarray:
    """The source's tensor in the dtype that is written. Raises CheckpointError when it overflows."""
    values = source.read(name)
    if values.dtype == want:
        return values
    with np.errstate(over="ignore"):
        out = values.astype(want)
    if want == np.float16 and np.isinf(out).any() and not np.isinf(values).any():
        raise CheckpointError(
            f"{source.tensors[name].file}: tensor {name} has values beyond float16's 65504; use bfloat16"
        )
    return out


def write_files(source: Checkpoint, target: Path, dtype: str) -> None:
    """Config, generation config and tokenizer files."""
    config = dict(source.config)
    if dtype != "auto":
        config.pop("dtype", None)
        config["torch_dtype"] = dtype
    write_json(target / "config.json", config)
    if source.generation_config:
        write_json(target / "generation_config.json", source.generation_config)
    for name in TOKENIZER_FILES:
        if (source.tokenizer_dir / name).exists():
            shutil.copyfile(source.tokenizer_dir / name, target / name)


def describe(source: Checkpoint, dtype: str) -> dict[str, Any]:
    """What tells one source from another: its files with size and time, its tensors, the dtype."""
    files = {}
    for file in sorted({info.file for info in source.tensors.values()}):
        stat = file.stat()
        files[file.name] = [stat.st_size, stat.st_mtime_ns]
    return {
        "path": str(source.path),
        "dtype": dtype,
        "quantization": source.scheme if isinstance(source, QuantisedCheckpoint) else None,
        "files": files,
        "num_tensors": len(source.tensors),
    }


# ---- the target directory ----


@contextmanager
def _owned(target: Path) -> Iterator[None]:
    """Make the directory, and hold it against a second conversion at the same time."""
    target.mkdir(parents=True, exist_ok=True)
    handle = os.open(target, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"{target}: another conversion is writing here") from error
        yield
    finally:
        os.close(handle)


def _begin(target: Path, described: dict[str, Any]) -> bool:
    """Claim an empty directory, or clear what an interrupted run left incomplete. True: resumed."""
    if not (target / BEGUN).exists():
        unwritten = f".{BEGUN}.partial"
        others = sorted(entry.name for entry in target.iterdir() if entry.name != unwritten)
        if others:
            raise CheckpointError(
                f"{target}: not empty and not a conversion ({', '.join(others[:5])}); choose another --to"
            )
        write_json(target / BEGUN, described)
        (target / ITEMS).mkdir()
        return False
    _refuse_other(target, read_json(target / BEGUN), described)
    (target / ITEMS).mkdir(exist_ok=True)
    for entry in (target / ITEMS).iterdir():
        if entry.is_dir() and item_record(target, entry.name) is None:
            shutil.rmtree(entry)
    return True


def _refuse_other(target: Path, there: dict[str, Any] | None, described: dict[str, Any]) -> None:
    """Raise unless what `target` was begun from is this very source. Its location may have changed."""
    there = there or {}
    for key in ("dtype", "quantization", "files", "num_tensors"):
        if there.get(key) != described[key]:
            raise CheckpointError(
                f"{target}: holds a conversion of {there.get('path')} with another {key} "
                f"({there.get(key)}, now {described[key]}); remove it or choose another --to"
            )


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[item]}"),
        console=console,
    )


if __name__ == "__main__":
    sys.exit(main())
