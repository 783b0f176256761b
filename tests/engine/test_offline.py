"""`jaxserve.Engine`: what it refuses at its start, and how it ends."""

import threading

import jax
import pytest

import jaxserve
from jaxserve.config import ConfigError, ServerConfig
from jaxserve.engine.build import _choose_gpus
from jaxserve.messages import EngineDeadError, Generate
from jaxserve.server.errors import RequestError
from jaxserve.weights import CheckpointError
from tests.conftest import GOLDEN, SMALL
from tests.text import tiny_tokenizer

LONG = {"temperature": 0, "max_new_tokens": 480, "ignore_eos": True}


def make(compile_cache: str, **options) -> jaxserve.Engine:
    return jaxserve.Engine(
        model_path=str(GOLDEN / "llama"), **{**SMALL, "compile_cache_dir": compile_cache, **options}
    )


def test_engine_that_was_shut_down_says_so(compile_cache):
    engine = make(compile_cache)
    stream = engine.generate(input_ids=[5], sampling_params=LONG, stream=True)
    next(stream)
    engine.shutdown()
    engine.shutdown()
    for ask in (
        lambda: engine.generate(input_ids=[5]),
        lambda: next(engine.generate(input_ids=[5], stream=True)),
        lambda: next(stream),
        engine.loads,
        engine.abort,
    ):
        with pytest.raises(EngineDeadError, match="the engine was shut down"):
            ask()


def test_shutdown_frees_the_devices_memory_although_the_engine_is_still_named(compile_cache):
    before = len(jax.live_arrays())
    engine = make(compile_cache)
    assert len(jax.live_arrays()) > before
    engine.shutdown()
    assert len(jax.live_arrays()) == before


def test_caller_whom_the_engine_never_heard_is_told_of_the_shutdown(compile_cache, monkeypatch):
    """A request of another thread that came after the engine's last step."""
    engine, ends = make(compile_cache), []
    send = engine._connection.send
    monkeypatch.setattr(engine._connection, "send", lambda m: isinstance(m, Generate) or send(m))

    def ask() -> None:
        with pytest.raises(EngineDeadError, match="the engine was shut down"):
            engine.generate(input_ids=[5, 6], sampling_params=LONG)
        ends.append("told")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    while not engine._connection.waits:
        pass
    engine.shutdown()
    thread.join(60)
    assert ends == ["told"]


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"load_format": "orbax"}, CheckpointError, "load_format=orbax: .*llama holds safetensors"),
        ({"dp_size": 2}, ConfigError, "dp_size=2 without enable_dp_attention makes full replicas, and"),
        (
            {"device": "cuda"},
            ConfigError,
            r"device=cuda is not there \(jax runs on cpu in this process\); install .*VISIBLE_DEVICES=0 in",
        ),
    ],
    ids=str,
)
def test_option_that_cannot_be_had_is_refused(compile_cache, options, error, message):
    with pytest.raises(error, match=message):
        make(compile_cache, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "tokenizer.json is missing; .*--skip-tokenizer-init"),
        ({"chat_template": "typo.jinja"}, "chat_template=typo.jinja: .*; --chat-template names another"),
    ],
    ids=str,
)
def test_text_is_refused_before_anything_is_loaded(compile_cache, monkeypatch, tmp_path, options, message):
    monkeypatch.setattr(jaxserve.offline, "build", lambda *args: pytest.fail("the model is built"))
    if options:
        tiny_tokenizer.write(tmp_path)
    with pytest.raises(ConfigError, match=message):
        make(compile_cache, skip_tokenizer_init=False, tokenizer_path=str(tmp_path), **options)


@pytest.mark.parametrize(
    "given, options, chosen",
    [
        (None, {"tp": 2, "base_gpu_id": 1}, "1,2"),
        ("4,5,6", {"tp": 2, "base_gpu_id": 1}, "5,6"),
        ("GPU-a,", {}, "GPU-a"),
        ("", {}, ""),  # hidden by the user, who wants a CPU
    ],
)
def test_an_instance_sees_its_own_gpus(given, options, chosen):
    assert _choose_gpus(ServerConfig.from_keywords(model_path="m", **options), given) == chosen


@pytest.mark.parametrize(
    "given, options, left",
    [
        ("4,5", {"tp": 2, "base_gpu_id": 1}, 1),
        ("4", {"tp": 2}, 1),
        ("4", {"base_gpu_id": 1}, 0),
        ("", {"device": "cuda"}, 0),
    ],
)
def test_fewer_gpus_than_are_wanted_are_refused_by_name(given, options, left):
    config = ServerConfig.from_keywords(model_path="m", **options)
    with pytest.raises(
        ConfigError, match=f"CUDA_VISIBLE_DEVICES={given} leaves {left} GPUs from base_gpu_id="
    ):
        _choose_gpus(config, given)


def test_text_that_holds_half_a_character_is_the_callers_mistake(engine, tmp_path):
    tiny_tokenizer.write(tmp_path)
    served = engine("llama", skip_tokenizer_init=False, tokenizer_path=str(tmp_path))
    with pytest.raises(RequestError, match="text holds half a surrogate pair"):
        served.generate(prompt="\ud800")
