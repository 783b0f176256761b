"""How programs are compiled: together, and alone where memory is too little for that."""

import copy
import threading

import jax
import pytest

from jaxserve.engine import runner as runner_module

OUT_OF_MEMORY = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1018.00MiB"


@pytest.fixture
def compile_all(engine, monkeypatch):
    """`compile_all(compile_program)`: an engine's programs, compiled once more by another function."""
    runner = engine()._engine.runner  # first, or it would be compiled by that function too

    def run(compile_program):
        monkeypatch.setattr(runner_module, "compile_program", compile_program)
        again = copy.copy(runner)
        again._programs, seen = {}, []
        again.compile_all(lambda done, total: seen.append((done, total)))
        assert seen == [(done, len(again.program_keys)) for done in range(len(again.program_keys) + 1)]
        return again._programs

    return run


def test_who_finds_no_memory_beside_others_is_compiled_alone(compile_all):
    here, alone = threading.current_thread(), []

    def compile_program(*args):
        name = args[-1]
        if threading.current_thread() is here:
            alone.append(name)
        elif "greedy" in name:
            raise jax.errors.JaxRuntimeError(OUT_OF_MEMORY)
        return name

    programs = compile_all(compile_program)
    assert alone and all("greedy" in name for name in alone)
    assert {str(key): program for key, program in programs.items()} == {
        str(key): str(key) for key in programs
    }


@pytest.mark.parametrize("message", [OUT_OF_MEMORY, "INTERNAL: no"])
def test_program_that_cannot_be_compiled_ends_the_start(compile_all, message):
    def compile_program(*args):
        if "score" in args[-1]:
            raise jax.errors.JaxRuntimeError(message)
        return args[-1]

    with pytest.raises(jax.errors.JaxRuntimeError, match=message.split(":")[0]):
        compile_all(compile_program)
