"""What products take that is made in the form they want.

A product of float8 numbers wants rows in float8, which may be made in one pass together with what comes
before them, as a norm is. Any other product wants an array.
"""

from abc import ABC, abstractmethod
from functools import cached_property

import jax
from jax.typing import DTypeLike

from jaxserve.ops import float8_rows
from jaxserve.ops.float8_rows import Float8Rows


class Operand(ABC):
    """Rows [T, in], made when they are asked for, each form once: several products may share one."""

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike):
        self.shape, self.dtype = shape, dtype

    @cached_property
    def wide(self) -> jax.Array:
        """As an array of `dtype`."""
        return self.make_wide()

    @cached_property
    def float8(self) -> Float8Rows:
        """The same rows, quantised; for rows that lie whole on one device."""
        return self.make_float8()

    @abstractmethod
    def make_wide(self) -> jax.Array: ...

    def make_float8(self) -> Float8Rows:
        return float8_rows.quantise(self.wide)


def wide(x: jax.Array | Operand) -> jax.Array:
    return x.wide if isinstance(x, Operand) else x
