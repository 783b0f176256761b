"""What the whole suite shares: the platform, one compile cache, and engines that live for a session, which
is that of one process where tests are spread over several (`-n`).

Tests run on eight virtual CPU devices, so that mesh tests run anywhere and in any order. `-m gpu`
alone runs on the GPU instead. `--slow` adds tests marked `slow`.
"""

import gc
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # `tests.models.tiny` and its like

from jaxserve.engine import kept_programs
from tests.compiling import QUICK_COMPILE

for name in ("PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE"):  # processes that tests start are as a user's
    os.environ.pop(name, None)  # they buffer what they write, and read what the first of them compiled

jax.config.update("jax_numpy_dtype_promotion", "strict")  # a mixed dtype is a mistake in the making

GOLDEN = Path(__file__).parent / "golden"
MOST_MAPS = 40_000
SMALL = {
    "skip_tokenizer_init": True,
    "grammar_backend": "none",
    "dtype": "float32",
    "device": "cpu",
    "max_running_requests": 4,
    "chunked_prefill_size": 32,
    "max_total_tokens": 1024,
    "log_level": "warning",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests marked slow")
    parser.addoption("--devices", type=int, default=8, help="virtual CPU devices (default 8)")


def pytest_configure(config: pytest.Config) -> None:
    if not on_gpu(config):
        os.environ["JAX_PLATFORMS"] = "cpu"  # of the processes that tests start
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", config.option.devices)
        os.environ["XLA_FLAGS"] = QUICK_COMPILE  # of these processes too; the demo compiles as a user's does
        jax.config.update("jax_traceback_in_locations_limit", 0)  # a sixth of the time to trace
        os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
    # Programs of an earlier run are read back, which more than halves the time of the next one.
    jax.config.update("jax_compilation_cache_dir", compile_cache_dir(config))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    kept_programs.in_use = False  # here engines are patched; processes that tests start are as a user's


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.keywords and not on_gpu(config):
            item.add_marker(pytest.mark.skip(reason="runs under -m gpu"))
        if item.get_closest_marker("slow") and not config.option.slow:
            item.add_marker(pytest.mark.skip(reason="runs under --slow"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the backend before a test that runs an engine here asks for another number of devices."""
    if not on_gpu(session.config):  # there the engine sets memory limits first
        jax.jit(lambda x: x + 1)(1)
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)  # tracing makes much that stays: a tenth of its time went to collections


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, which asks where `-n` says more than one process
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from tests.spread import ByScope

    config.option.loadscopereorder = False  # the files with the longest tests are collected first
    return ByScope(config, log)


def on_gpu(config: pytest.Config) -> bool:
    return config.option.markexpr == "gpu"


def compile_cache_dir(config: pytest.Config) -> str:
    cache = getattr(config, "cache", None)  # there is none under -p no:cacheprovider
    if cache is None:
        return os.path.join(tempfile.gettempdir(), "jaxserve-test-xla")
    return str(cache.mkdir("xla"))


@pytest.fixture(scope="session")
def compile_cache(request: pytest.FixtureRequest) -> str:
    """The directory of compiled programs, for engines in processes of their own."""
    return compile_cache_dir(request.config)


MakeEngine = Callable[..., Any]


@pytest.fixture(scope="session")
def engine(compile_cache: str) -> Iterator[MakeEngine]:
    """`engine(family, **server_args)`: a tiny `jaxserve.Engine`, made once a session.

    At the end each is audited: every page and slot has one owner, nothing is in use, and no program
    was compiled after readiness.
    """
    import jaxserve

    made: dict[Any, jaxserve.Engine] = {}
    problems: list[str] = []

    def close(key: Any) -> None:
        try:
            audit(made.pop(key))
        except Exception as error:  # a dead engine too; the others are audited all the same
            problems.append(f"{key}: {error!r}")

    def make(family: str = "llama", **options: Any) -> jaxserve.Engine:
        key = (family, *sorted(options.items()))
        if key not in made:
            # The last one stays: a test may compare it with the one it asks for now.
            while len(made) > 1 and num_memory_maps() > MOST_MAPS:
                close(next(iter(made)))  # the one that was used least recently
            path = str(GOLDEN / family) if (GOLDEN / family).is_dir() else family
            options = {**SMALL, "compile_cache_dir": compile_cache, **options}
            made[key] = jaxserve.Engine(model_path=path, **options)
        made[key] = made.pop(key)
        return made[key]

    yield make
    for key in list(made):
        close(key)
    assert not problems, "\n".join(problems)


@pytest.fixture(scope="module", autouse=True)
def few_memory_maps() -> Iterator[None]:
    """Forget compiled functions between modules before the process runs out of memory maps."""
    yield
    if num_memory_maps() > MOST_MAPS:
        jax.clear_caches()


def num_memory_maps() -> int:
    """A tiny engine takes about 1,000; at the kernel's limit (65,530) XLA crashes."""
    with open("/proc/self/maps") as file:
        return sum(1 for _ in file)


def audit(engine: Any) -> None:
    """Shut an idle engine down and check that it lost nothing. Raises AssertionError."""
    scheduler = engine._engine.scheduler
    try:
        engine.flush_cache()
        stats = engine.stats()
        assert stats["requests"] == 0
        assert stats["compiles_after_ready"] == 0
        assert [row["num_used_tokens"] for row in engine.loads()] == [0] * engine.info.dp_size
    finally:
        engine.shutdown()
    scheduler.check()  # its thread has ended
    free = [rank.pool.num_free for rank in scheduler.ranks]
    assert free == [scheduler.limits.num_pages] * len(scheduler.ranks), "pages are lost"
