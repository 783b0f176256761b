"""An engine's compiled programs, found in jax's compile cache without tracing them.

jax knows a program by the text that tracing makes of it, which takes one Python thread several seconds
for an 8B model's forty programs. Here a file for each engine says which entries of jax's cache are its
programs, with what jax needs to call them; an engine that finds its file reads all of them at once and
traces nothing. The entries stay jax's: a copy would double the cache, and a program that came from the
cache has lost its functions when it is serialized again (CPU, jaxlib 0.11.2: `serialize_executable`
raises nothing, and the loaded program fails in its first run).

The file's name is a key of everything that settles programs before they are traced: jaxserve's sources
and the versions of what they call; configuration and model; each program's arguments (shape, dtype,
sharding), donations, output shardings and compiler options; the devices; and the settings that jax
takes from its configuration and the environment. It changes more often than programs do, which costs
one start as before. For programs that change while it does not, code would have to be patched in the
process, as tests do; they switch this off (`in_use`). File and entries carry digests: what is missing
or differs is a log line and a start as before. The files are pickles, and as trusted as jax's entries,
which are machine code: both lie in the user's own directory.

Several hosts do not use this: they have their programs from host 0, see `jaxserve.engine.follow`.
"""

import contextlib
import dataclasses
import functools
import importlib
import io
import json
import logging
import os
import pickle
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import jaxlib.version
import numpy as np
import xxhash
from jax.experimental import serialize_executable
from jax.sharding import Mesh

logger = logging.getLogger(__name__)

in_use = True  # by engines of this process
PACKAGE = Path(__file__).parents[1]
FOLDER = "engines"  # in jax's cache
MOST_ENGINES = 64  # whose files are left, the newest; each is less than a megabyte or two
STALE_S = 3600.0  # age of a file that nobody is writing any more
ENVIRONMENT = ("XLA_", "JAX_", "TF_", "MOSAIC_", "TRITON_", "NVIDIA_TF32_OVERRIDE")
NO_MATTER = re.compile("cache|dump", re.IGNORECASE)  # where something is kept, in names of settings

Task = tuple[Callable, tuple[Any, ...], tuple[int, ...], Any]
"""(function, abstract arguments, donated arguments, output shardings) of a program."""


class Entry(NamedTuple):
    """A program in jax's cache."""

    cache_key: str
    digest: bytes  # of what jax has under that key
    call: bytes  # pickled by jax: all but the executable
    in_tree: Any
    out_tree: Any


class KeptPrograms:
    """The programs of one engine: `take` them, or compile them in `watch`, `note` each, and `write`.

    Args:
        directory: jax's compile cache.
        facts: of configuration and model, whatever settles programs and is not in their arguments.
        mesh: of this process's devices alone.
    """

    def __init__(self, directory: Path, facts: Any, mesh: Mesh):
        self._folder = directory / FOLDER
        self._facts = facts
        self._devices = list(mesh.devices.flat)
        self._mesh = mesh
        self._file: Path | None = None
        self._entries: dict[str, Entry] = {}
        self._watched = threading.local()

    def take(
        self,
        tasks: Mapping[Any, Task],
        options: Mapping[Any, Mapping[str, Any]],
        progress: Callable[[int, int], None],
    ) -> dict[Any, jax.stages.Compiled]:
        """All programs, ready to be called; none when one of them cannot be had.

        `progress(done, total)` counts programs.
        """
        begin_s = time.monotonic()
        try:
            self._file = self._folder / f"{self.key(tasks, options)}.programs"
            entries = _read(self._file)
            cache = _cache_of(self._devices[0].client)
            done, programs = 0, {}
            with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
                loads = {pool.submit(self._load, cache, entries[str(key)]): key for key in tasks}
                try:
                    for load in as_completed(loads):
                        programs[loads[load]] = load.result()
                        done += 1
                        progress(done, len(tasks))
                except Exception:
                    pool.shutdown(cancel_futures=True)
                    raise
            with contextlib.suppress(OSError):  # a directory that only others write
                os.utime(self._file)  # used, and so one of the newest
        except FileNotFoundError:
            logger.info("no programs are kept of this engine yet: they are traced")
            return {}
        except Exception as error:  # whatever it is, compiling is the cure
            logger.warning("kept programs are not used, and traced instead: %s: %r", self._file, error)
            return {}
        logger.info("%d programs were kept, taken in %.1f s", len(programs), time.monotonic() - begin_s)
        return programs

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """While programs are compiled: see which entries of jax's cache they are."""
        try:
            cache = _cache_of(self._devices[0].client)
            watching = _Watching(cache, self._watched)
        except Exception as error:
            logger.info("programs will not be kept: %s", error)
            yield
            return
        compilation_cache = _jax_module("compilation_cache")
        compilation_cache._cache = watching
        try:
            yield
        finally:
            compilation_cache._cache = cache

    def note(self, key: Any, program: jax.stages.Compiled) -> None:
        """The program that this thread has just compiled."""
        seen, self._watched.seen = getattr(self._watched, "seen", None), None
        if seen is None:  # jax could not write it, or does not use its cache
            return
        try:
            name, content = seen
            self._entries[str(key)] = _entry(name, content, program)
        except Exception as error:  # jax's pickler says no in many ways
            logger.debug("a program cannot be kept: %s: %r", key, error)

    def write(self, num_programs: int) -> None:
        """Note the engine for its next start, and forget the oldest ones. Never raises."""
        entries, self._entries = self._entries, {}
        if self._file is None:  # there is no key, as was said
            return
        if len(entries) < num_programs:
            logger.info("%d of %d programs are in jax's cache: none is kept", len(entries), num_programs)
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            part = self._file.with_suffix(f".{os.getpid()}.part")
            body = pickle.dumps(entries)
            part.write_bytes(_digest(body) + body)
            part.replace(self._file)
            _forget(self._folder)
        except Exception as error:  # mostly OSError; none is worth this start
            logger.warning("programs are not kept for the next start: %r", error)

    def key(self, tasks: Mapping[Any, Task], options: Mapping[Any, Mapping[str, Any]]) -> str:
        """The name of the engine that has these programs here and now."""
        key = xxhash.xxh3_128(json.dumps(self._facts, sort_keys=True, default=repr).encode())
        key.update(repr(_surroundings(self._mesh)).encode())
        _jax_module("cache_key")._hash_accelerator_config(key, self._mesh.devices)  # as jax does
        describe = functools.cache(_describe)
        for name, (_, args, donated, shardings) in tasks.items():
            leaves, tree = jax.tree.flatten(args)
            key.update(repr((name, tree, donated, shardings, sorted(options[name].items()))).encode())
            key.update("\n".join(map(describe, leaves)).encode())
        return key.hexdigest()

    def _load(self, cache: Any, entry: Entry) -> jax.stages.Compiled:
        compilation_cache = _jax_module("compilation_cache")
        stored = cache.get(entry.cache_key)
        if stored is None or _digest(stored) != entry.digest:
            raise LookupError(f"jax's cache has {'no' if stored is None else 'another'} {entry.cache_key}")
        executable, _ = compilation_cache.extract_executable_and_time(
            compilation_cache.decompress_executable(stored)
        )
        backend = self._devices[0].client
        unpickler = serialize_executable._JaxPjrtUnpickler(io.BytesIO(entry.call), backend, self._devices)
        unloaded, args_info, no_kwargs = unpickler.load()
        loaded = dataclasses.replace(
            unloaded,
            xla_executable=backend.deserialize_executable(
                executable, executable_devices=unpickler.execution_devices
            ),
        ).load()
        return jax.stages.Compiled(
            loaded, [], entry.in_tree.unflatten(args_info), entry.out_tree, no_kwargs=no_kwargs
        )


class _Watching:
    """jax's cache; in `seen.seen` each thread has the last entry (key, content) that it read or wrote.

    Two threads may compile what is one program, not to the same bytes. The first one's stay, also where
    both look for them at once, which jax's cache (0.11.2) does not see to.
    """

    def __init__(self, cache: Any, seen: threading.local):
        self._cache, self._seen = cache, seen
        self._path = cache._path
        self._lock = threading.RLock()

    def get(self, key: str) -> bytes | None:
        with self._lock:
            content = self._cache.get(key)
        if content is not None:
            self._seen.seen = (key, content)
        return content

    def put(self, key: str, value: bytes) -> None:
        with self._lock:
            self._cache.put(key, value)
            self.get(key)


def _jax_module(name: str) -> Any:
    """One without a public name. Raises ImportError where a version of jax has another place for it."""
    return importlib.import_module(f"jax._src.{name}")


def _cache_of(backend: Any) -> Any:
    """jax's persistent cache. Raises LookupError where it has none."""
    compilation_cache = _jax_module("compilation_cache")
    cache = compilation_cache._get_cache(backend) if compilation_cache.is_cache_used(backend) else None
    if cache is None:
        raise LookupError("jax's compile cache is off")
    return cache


def _entry(name: str, content: bytes, program: jax.stages.Compiled) -> Entry:
    """As `serialize_executable.serialize`, without the executable. Raises ValueError where that does."""
    unloaded: Any = program._executable._unloaded_executable  # type: ignore[attr-defined]
    held = (program._params.const_args, unloaded.host_callbacks, unloaded.keepalive, unloaded.mut)
    if any(held):
        raise ValueError("it holds on to objects of this process")
    args_info, in_tree = jax.tree.flatten(program.args_info)
    call = io.BytesIO()
    serialize_executable._JaxPjrtPickler(call).dump(
        (dataclasses.replace(unloaded, xla_executable=None), args_info, program._no_kwargs)
    )
    return Entry(name, _digest(content), call.getvalue(), in_tree, program.out_tree)


def _read(file: Path) -> dict[str, Entry]:
    """Raises OSError; ValueError for a file that is not what was written."""
    content = file.read_bytes()
    digest, body = content[:16], content[16:]
    if _digest(body) != digest:
        raise ValueError("the file is damaged")
    return pickle.loads(body)


def _forget(folder: Path) -> None:
    """Remove all but the newest engines, and what a killed process left. Other names are not ours."""
    ages: list[tuple[float, Path]] = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # removed by another process
            age_s = time.time() - path.stat().st_mtime
            if re.fullmatch(r"[0-9a-f]{32}\.programs", path.name):
                ages.append((age_s, path))
            elif re.fullmatch(r"[0-9a-f]{32}\.\d+\.part", path.name) and age_s > STALE_S:
                path.unlink()
    for _, path in sorted(ages)[MOST_ENGINES:]:
        path.unlink(missing_ok=True)


def _surroundings(mesh: Mesh) -> list[Any]:
    """What settles a program beside what is asked for: sources, software, devices, settings."""
    backend = mesh.devices.flat[0].client
    settings = {name: value for name, value in jax.config.values.items() if not NO_MATTER.search(name)}
    environment = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(ENVIRONMENT) and not NO_MATTER.search(name)
    }
    return [
        _sources_digest(PACKAGE),
        [sys.version, jax.__version__, jaxlib.version.__version__, flax.__version__, np.__version__],
        [backend.platform, backend.platform_version],
        [(device.id, device.device_kind) for device in mesh.devices.flat],
        [mesh.axis_names, mesh.devices.shape, mesh.axis_types],
        sorted(settings.items()),
        sorted(environment.items()),
        [flag for flag in sys.argv if flag.startswith("--xla")],
    ]


def _sources_digest(package: Path) -> str:
    digest = xxhash.xxh3_128()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _describe(leaf: jax.ShapeDtypeStruct) -> str:
    return f"{leaf.shape} {leaf.dtype} {leaf.weak_type} {leaf.sharding}"


def _digest(content: bytes) -> bytes:
    return xxhash.xxh3_128_digest(content)
