"""Programs that several engines of a process have in common, traced and compiled once.

Engines of other options often run programs that are the same: a cache that is off, the head of another
family with as many dimensions. What a program is made of is all in its function and arguments, which are
compared here; where something else that is traced was patched, an engine has its own (`engine(apart=...)`).
"""

import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any
from unittest import mock

import jax

from jaxserve.engine import batch, compiler, programs, runner
from jaxserve.engine.programs import ModelFunction


@dataclass(frozen=True)
class _Made:
    """What stands for a lowered program: its key, and the program, compiled or yet to be."""

    key: Hashable
    program: Any
    is_compiled: bool


class SharedPrograms:
    """Compiled programs by what they are made of, for as long as an engine has them."""

    def __init__(self) -> None:
        self._programs: weakref.WeakValueDictionary[Hashable, Any] = weakref.WeakValueDictionary()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Engines that start meanwhile share their programs with each other."""
        if runner.lower_program is not compiler.lower_program:  # a test looks at what is compiled
            yield
            return
        with (
            mock.patch.object(runner, "lower_program", self._lower),
            mock.patch.object(runner, "compile_program", self._compile),
        ):
            yield

    def _lower(self, function: Callable, *args: Any) -> _Made:
        key = _key(function, args)
        if (known := self._programs.get(key)) is not None:
            return _Made(key, known, True)
        return _Made(key, compiler.lower_program(function, *args), False)

    def _compile(self, made: _Made, name: str) -> Callable:
        if made.is_compiled:
            return made.program
        program = compiler.compile_program(made.program, name)
        self._programs[made.key] = program
        return program


def _key(function: Any, args: tuple[Any, ...]) -> Hashable:
    """Of what `lower_program` is given; its last argument is only a name."""
    if not isinstance(function, partial):
        return object()  # like no other
    assert not function.keywords
    parts = tuple(_part(part, function.func, args[0]) for part in function.args)
    flat, tree = jax.tree.flatten(args[:-1])
    return function.func, parts, tuple(flat), tree


def _part(part: Any, function: Callable, arrays: tuple[Any, ...]) -> Hashable:
    """What a program's function was made with, so that it equals its like of another engine."""
    if isinstance(part, batch.Packing):
        return tuple(part.slices.items())
    if isinstance(part, ModelFunction) and function in (programs.sample, programs.score):
        return _head(part, *arrays[:2])
    return part


@lru_cache(maxsize=1000)
def _head_text(model: ModelFunction, leaves: tuple[Any, ...], hidden_RD: Any) -> str:
    return (
        jax.jit(lambda leaves, hidden: model.call(leaves).logits(hidden)).lower(leaves, hidden_RD).as_text()
    )


def _head(model: ModelFunction, leaves: list[Any], hidden_RD: Any) -> str:
    """All that these programs have of a model is how it makes logits, which families have in common."""
    return _head_text(model, tuple(leaves), hidden_RD)
