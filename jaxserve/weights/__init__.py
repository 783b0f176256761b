"""Checkpoints: opening them in any format, and streaming them into sharded arrays.

`open_checkpoint` finds the format; `load` and `load_dummy` fill an abstract model. No mesh and no
model is known here: the caller says which sharding each parameter gets.
"""

from collections.abc import Callable
from pathlib import Path

from jaxserve.weights import hub, orbax
from jaxserve.weights.checkpoint import Checkpoint, CheckpointError, TensorInfo
from jaxserve.weights.fill import load, load_dummy
from jaxserve.weights.gguf import GGUFCheckpoint
from jaxserve.weights.grouped import in_groups
from jaxserve.weights.safetensors import SafetensorsCheckpoint

__all__ = ["Checkpoint", "CheckpointError", "TensorInfo", "load", "load_dummy", "open_checkpoint"]


FORMATS: dict[str, type] = {
    "safetensors": SafetensorsCheckpoint,
    "gguf": GGUFCheckpoint,
    "orbax": orbax.OrbaxCheckpoint,
}


def open_checkpoint(
    path: str | Path,
    revision: str | None = None,
    load_format: str = "auto",
    check: Callable[[Path], None] | None = None,
) -> Checkpoint:
    """Open a Hugging Face directory, a hub id, a GGUF file or a converted (orbax) directory.

    Reads headers only. What exists on disk is never looked up on the hub; `revision` is for hub ids, and
    `check` (see `hub.download`) too.

    Raises: CheckpointError when it is none of these, is damaged or incomplete, or is of another format
    than `load_format`, a key of FORMATS; ConfigError for integers in groups of a kind that is not read.
    """
    checkpoint = _open(path, revision, check)
    if load_format != "auto" and not isinstance(checkpoint, FORMATS[load_format]):
        found = next(name for name, kind in FORMATS.items() if isinstance(checkpoint, kind))
        raise CheckpointError(f"load_format={load_format}: {path} holds {found}; leave load_format out")
    return in_groups(checkpoint)


def _open(path: str | Path, revision: str | None, check: Callable[[Path], None] | None) -> Checkpoint:
    local = Path(path).expanduser()
    if local.is_file():
        if local.suffix != ".gguf":
            raise CheckpointError(
                f"{path}: a single file must be a .gguf; for safetensors name its directory"
            )
        return GGUFCheckpoint(local)
    if local.is_dir():
        if (local / orbax.MANIFEST).exists():
            return orbax.OrbaxCheckpoint(local)
        if (local / orbax.BEGUN).exists():
            raise CheckpointError(
                f"{path}: its conversion was interrupted; run tools.convert_checkpoint again to complete it"
            )
        return SafetensorsCheckpoint(local)
    if hub.is_hub_id(str(path)):
        return SafetensorsCheckpoint(hub.download(str(path), revision, check))
    raise CheckpointError(f"{path}: no such file or directory, and not a hub id of the form owner/name")
