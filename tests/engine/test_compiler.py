"""How programs are compiled: together, and alone where memory is too little for that."""

import copy
import threading

import jax
import pytest

from jaxserve.engine import runner as runner_module
from jaxserve.engine.batch import Bucket
from jaxserve.engine.compiler import compiler_options
from jaxserve.engine.programs import GREEDY

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


def test_programs_are_traced_one_after_another_in_an_order_that_does_not_change(engine, monkeypatch):
    """See `lower_program`."""
    runner, orders = engine()._engine.runner, []

    def lower_program(*args):
        orders[-1].append((args[-1], threading.current_thread()))

    monkeypatch.setattr(runner_module, "lower_program", lower_program)
    monkeypatch.setattr(runner_module, "compile_program", lambda lowered, name: name)
    for _ in range(2):
        orders.append([])
        again = copy.copy(runner)
        again._programs = {}
        again.compile_all(lambda done, total: None)
        assert [name for name, _ in orders[-1]] == [str(key) for key in again.program_keys]
        assert len({thread for _, thread in orders[-1]}) == 1
    assert again.program_keys == runner.program_keys


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


@pytest.mark.parametrize("rows, wide, int8", [(32, True, True), (256, False, True), (512, False, False)])
def test_only_products_with_int8_stay_with_triton_above_64_rows(monkeypatch, rows, wide, int8):
    """Heads are never in int8: their products go by the rows alone."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    step, head = Bucket(rows, rows, 0, rows, 128), (rows, GREEDY)
    for program, has_int8, triton in ((step, False, wide), (step, True, int8), (head, True, wide)):
        options = compiler_options(program, has_int8)
        assert options["xla_gpu_enable_triton_gemm"] is triton
        assert ("xla_gpu_autotune_level" in options) is not triton  # cuBLASLt chooses alone
