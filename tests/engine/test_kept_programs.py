"""An engine's second start takes the programs of its first, or compiles as if there were none."""

import copy
import logging
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import compilation_cache

import jaxserve
from jaxserve import mesh as meshes
from jaxserve.engine import kept_programs
from jaxserve.engine import runner as runner_module
from jaxserve.engine.kept_programs import KeptPrograms
from tests.conftest import GOLDEN, SMALL, audit
from tests.engine.asking import Golden, ask, check_greedy, golden_rows, tokens

LAYOUTS = {
    "llama": {},
    "deepseek_v3": {"tp": 4, "dp_size": 2, "ep": 2, "enable_dp_attention": True},
}
HOUR_S = 3600.0


def refuse(*args):
    raise AssertionError(f"traced or compiled: {args[-1]}")


@pytest.mark.parametrize("family", LAYOUTS)
def test_second_start_traces_nothing_and_answers_the_same(family, compile_cache, monkeypatch):
    monkeypatch.setattr(kept_programs, "in_use", True)
    options = {**SMALL, **LAYOUTS[family], "compile_cache_dir": compile_cache}
    golden = Golden.read(family)
    answers = []
    for _ in range(2):
        engine = jaxserve.Engine(model_path=str(GOLDEN / family), **options)
        replies = ask(engine, golden_rows(golden))
        check_greedy(golden, replies)
        answers.append(tokens(replies))
        runner = engine._engine.runner
        assert all(runner.hlo(key).startswith("HloModule") for key in runner.program_keys)
        audit(engine)  # nothing was compiled after readiness
        monkeypatch.setattr(runner_module, "lower_program", refuse)
        monkeypatch.setattr(runner_module, "compile_program", refuse)
    assert answers[0] == answers[1]


# ---- the key ----


def square(x):
    return x * x


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((1, 1, 1), meshes.AXES, devices=jax.devices()[:1])


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Sources in place of jaxserve's own."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "model.py").write_text("x = 1\n")
    monkeypatch.setattr(kept_programs, "PACKAGE", package)
    return package


def key(mesh, facts=None, name="square", shape=(8,), dtype=jnp.float32, spec=(), donated=(), options=None):
    sharding = jax.NamedSharding(mesh, jax.P(*spec))
    task = (square, (jax.ShapeDtypeStruct(shape, dtype, sharding=sharding),), donated, sharding)
    return KeptPrograms(Path("/nowhere"), facts or {}, mesh).key({name: task}, {name: options or {}})


@pytest.mark.parametrize(
    "other",
    [
        {"facts": {"rope_theta": 1e6}},
        {"name": "cube"},
        {"shape": (16,)},
        {"dtype": jnp.bfloat16},
        {"spec": ("tp",)},
        {"donated": (0,)},
        {"options": {"xla_gpu_enable_triton_gemm": False}},
    ],
    ids=lambda other: next(iter(other)),
)
def test_key_changes_with_what_a_program_is_made_of(mesh, other):
    assert key(mesh, **other) != key(mesh) == key(mesh)


def test_key_changes_with_a_source_file_and_comes_back_with_it(mesh, package):
    before = key(mesh)
    (package / "model.py").write_text("x = 2\n")
    assert key(mesh) != before
    (package / "model.py").write_text("x = 1\n")
    assert key(mesh) == before
    (package / "layer.py").touch()
    assert key(mesh) != before


def test_key_changes_with_what_compiles_differently_but_not_with_directories(mesh, monkeypatch):
    before = key(mesh)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    monkeypatch.setenv("HOME", "/elsewhere")
    assert key(mesh) == before
    with monkeypatch.context() as here:
        here.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=0")
        assert key(mesh) != before
    jax.config.update("jax_default_matmul_precision", "highest")
    try:
        assert key(mesh) != before
    finally:
        jax.config.update("jax_default_matmul_precision", None)
    assert key(mesh) == before


def test_key_changes_with_the_devices(mesh):
    same_shape = jax.make_mesh((1, 1, 1), meshes.AXES, devices=jax.devices()[1:2])
    wider = jax.make_mesh((1, 1, 2), meshes.AXES, devices=jax.devices()[:2])
    assert len({key(mesh), key(same_shape), key(wider)}) == 3


# ---- the file ----


class Small:
    """Two programs, compiled or taken as a runner's are; `kept` is made anew, as at a start."""

    def __init__(self, directory: Path, mesh: jax.sharding.Mesh):
        self.directory, self.mesh = directory, mesh
        sharding = jax.NamedSharding(mesh, jax.P())
        arg = jax.ShapeDtypeStruct((3,), jnp.float32, sharding=sharding)
        # Functions of its own, or jax would know them in this process, and not look into its cache.
        functions = {"square": partial(square), "twice": lambda x: x + x}
        self.tasks = {name: (function, (arg,), (0,), sharding) for name, function in functions.items()}
        self.options = {name: {} for name in self.tasks}
        self.told: list[tuple[int, int]] = []

    def kept(self) -> KeptPrograms:
        return KeptPrograms(self.directory, {}, self.mesh)

    def take(self, kept: KeptPrograms | None = None):
        self.told.clear()
        return (kept or self.kept()).take(self.tasks, self.options, lambda *done: self.told.append(done))

    def start(self) -> None:
        """A start that finds nothing."""
        kept = self.kept()
        assert self.take(kept) == {}
        with kept.watch():
            for name, (function, args, donated, _) in self.tasks.items():
                kept.note(name, jax.jit(function, donate_argnums=donated).lower(*args).compile())
        kept.write(len(self.tasks))

    @property
    def file(self) -> Path:
        return self.directory / "engines" / f"{self.kept().key(self.tasks, self.options)}.programs"


@pytest.fixture
def small(tmp_path, mesh):
    return Small(tmp_path, mesh)


def test_taken_program_computes_and_takes_its_donated_argument(small):
    small.start()
    programs = small.take()
    assert small.told == [(1, 2), (2, 2)]
    given = jnp.asarray([1.0, 2.0, 3.0])
    np.testing.assert_array_equal(programs["square"](given), [1, 4, 9])
    assert given.is_deleted()
    np.testing.assert_array_equal(programs["twice"](np.float32([1, 2, 3])), [2, 4, 6])
    with pytest.raises(TypeError, match="types"):
        programs["square"](np.zeros(4, np.float32))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def be_no_pickle(file: Path) -> None:
    file.write_bytes(kept_programs._digest(b"x") + b"x")


def be_a_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("damage", [cut, empty, flip, be_no_pickle, be_a_directory])
def test_damaged_file_is_told_and_not_used(small, damage, caplog):
    small.start()
    damage(small.file)
    with caplog.at_level(logging.WARNING):
        assert small.take() == {}
    assert "kept programs are not used" in caplog.text
    assert small.file.name in caplog.text


@pytest.mark.parametrize("content, told", [(None, "has no jit_"), (b"other", "has another jit_")])
def test_what_jax_has_no_longer_is_not_used(small, content, told, monkeypatch, caplog):
    small.start()
    monkeypatch.setattr(
        type(compilation_cache._get_cache(jax.devices()[0].client)), "get", lambda *_: content
    )
    with caplog.at_level(logging.WARNING):
        assert small.take() == {}
    assert told in caplog.text


def test_program_that_the_backend_does_not_load_is_not_used(small, monkeypatch, caplog):
    small.start()

    def decompress(stored):
        raise jax.errors.JaxRuntimeError("INTERNAL: no such kernel")

    monkeypatch.setattr(compilation_cache, "decompress_executable", decompress)
    with caplog.at_level(logging.WARNING):
        assert small.take() == {}
    assert "no such kernel" in caplog.text


def test_start_after_a_damaged_file_compiles_and_mends_it(engine, tmp_path):
    runner = copy.copy(engine()._engine.runner)

    def start() -> list[tuple[int, int]]:
        runner._programs, told = {}, []
        kept = KeptPrograms(tmp_path, {}, runner._mesh)
        runner.compile_all(lambda *done: told.append(done), kept)
        assert set(runner._programs) == set(runner.program_keys)
        return told

    told = start()
    (file,) = (tmp_path / "engines").iterdir()
    good = file.read_bytes()
    cut(file)
    assert start() == told == [(done, len(runner.program_keys)) for done in range(len(told))]
    assert len(file.read_bytes()) == len(good)
    assert runner.hlo("update_table").startswith("HloModule")


def test_directory_that_cannot_be_written_is_a_warning(small, caplog):
    (small.directory / "engines").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        small.start()
    assert "programs are not kept for the next start" in caplog.text


def test_without_jaxs_cache_nothing_is_kept(small, monkeypatch, caplog):
    monkeypatch.setattr(compilation_cache, "is_cache_used", lambda backend: False)
    with caplog.at_level(logging.INFO):
        small.start()
    assert "compile cache is off" in caplog.text
    assert not small.file.exists()


def test_version_of_jax_that_has_its_cache_elsewhere_keeps_nothing(small, monkeypatch, caplog):
    def moved(name):
        raise ImportError(f"no jax._src.{name}")

    monkeypatch.setattr(kept_programs, "_jax_module", moved)
    with caplog.at_level(logging.INFO):
        small.start()
    assert "not used, and traced instead" in caplog.text and "will not be kept" in caplog.text
    assert not (small.directory / "engines").exists()


def test_of_two_threads_that_compile_one_program_what_jax_has_is_noted():
    class Cache:
        """Keeps what was written first, but for writers that look at the same time, as jax's does."""

        def __init__(self):
            self.content: dict[str, bytes] = {}
            self._path = Path()

        def get(self, key):
            return self.content.get(key)

        def put(self, key, value):
            is_new = key not in self.content
            time.sleep(0.05)
            if is_new:
                self.content[key] = value

    seen = threading.local()
    cache = Cache()
    watching = kept_programs._Watching(cache, seen)
    together = threading.Barrier(4)

    def put(value):
        together.wait()
        watching.put("jit_score", value)
        return seen.seen

    with ThreadPoolExecutor(4) as pool:
        noted = list(pool.map(put, [b"one", b"two", b"three", b"four"]))
    assert set(noted) == {("jit_score", cache.content["jit_score"])}
    for value in (b"first", b"second"):  # one after the other
        watching.put("jit_sample", value)
        assert seen.seen == ("jit_sample", b"first")


def test_program_that_holds_on_to_this_process_is_not_kept(small, caplog):
    result = jax.ShapeDtypeStruct((3,), jnp.float32)
    function = lambda x: jax.pure_callback(lambda y: y, result, x)  # noqa: E731
    _, *others = small.tasks["twice"]
    small.tasks["twice"] = (function, *others)
    with caplog.at_level(logging.DEBUG):
        small.start()
    assert "holds on to objects" in caplog.text
    assert "1 of 2 programs are in jax's cache" in caplog.text
    assert not small.file.exists()


def test_watching_ends_with_the_compiling(small):
    before = compilation_cache._get_cache(jax.devices()[0].client)
    with pytest.raises(ZeroDivisionError), small.kept().watch():
        assert compilation_cache._cache is not before
        raise ZeroDivisionError
    assert compilation_cache._cache is before


def test_oldest_engines_are_forgotten_and_strangers_left_alone(small, monkeypatch):
    monkeypatch.setattr(kept_programs, "MOST_ENGINES", 3)
    folder, now = small.directory / "engines", time.time()
    folder.mkdir()

    def leave(name: str, hours: float) -> Path:
        path = folder / name
        path.write_bytes(b"x")
        os.utime(path, (now - hours * HOUR_S,) * 2)
        return path

    engines = [leave(f"{number:032x}.programs", hours=number + 1) for number in range(4)]
    killed, writing = leave(f"{9:032x}.123.part", hours=2), leave(f"{9:032x}.456.part", hours=0.5)
    strangers = [leave(name, hours=99) for name in ("notes.programs", "x.part", "readme")]
    small.start()
    assert sorted(folder.iterdir()) == sorted([small.file, *engines[:2], writing, *strangers])
    assert not killed.exists()


def test_engine_that_starts_is_one_of_the_newest(small):
    small.start()
    os.utime(small.file, (0, 0))
    assert small.take()
    assert time.time() - small.file.stat().st_mtime < HOUR_S
