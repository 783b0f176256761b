"""What products take that is made in the form they want.

A product of float8 numbers wants rows in float8, which may be made in one pass together with what comes
before them: a norm, and the sum and the scales of the product before it. Any other product wants an array.
"""

from abc import ABC, abstractmethod
from functools import cached_property

import jax
from jax.typing import DTypeLike

from jaxserve.ops import float8_rows
from jaxserve.ops.float8_rows import Float8Rows, Scaled


class Operand(ABC):
    """Rows [T, in], made when they are asked for, each form once: several products may share one."""

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike):
        self.shape, self.dtype = shape, dtype

    @cached_property
    def wide(self) -> jax.Array:
        """As an array of `dtype`."""
        return self.make_wide()

    @property
    def is_made(self) -> bool:
        """Whether somebody has asked for the array."""
        return "wide" in vars(self)

    @cached_property
    def float8(self) -> Float8Rows:
        """The same rows, quantised; for rows that lie whole on one device."""
        return self.make_float8()

    @abstractmethod
    def make_wide(self) -> jax.Array: ...

    def make_float8(self) -> Float8Rows:
        return float8_rows.quantise(self.wide)


class Product(Operand):
    """What comes out of a float8 product, whose scales may be applied later."""

    def __init__(self, scaled: Scaled, dtype: DTypeLike):
        super().__init__(scaled.sums_TO.shape, dtype)
        self.scaled = scaled

    def make_wide(self) -> jax.Array:
        return self.scaled.value(self.dtype)


class Sum(Operand):
    """Rows and a product."""

    def __init__(self, x_TD: jax.Array, product: Product):
        super().__init__(x_TD.shape, x_TD.dtype)
        self.x_TD, self.product = x_TD, product

    def make_wide(self) -> jax.Array:
        return self.x_TD + self.product.wide

    def normalised(self, gain_D: jax.Array, *, eps: float, offset: float) -> Float8Rows:
        """Rows of the norm of the sum, which is made on the way, once."""
        assert not self.is_made
        self.wide, rows = float8_rows.add_and_normalise(
            self.x_TD, self.product.scaled, gain_D, eps=eps, offset=offset
        )
        return rows


Rows = jax.Array | Operand


def wide(x: Rows) -> jax.Array:
    return x.wide if isinstance(x, Operand) else x


def add(x_TD: Rows, y_TD: Rows) -> Rows:
    """x + y, once somebody asks for it."""
    return Sum(wide(x_TD), y_TD) if isinstance(y_TD, Product) else wide(x_TD) + wide(y_TD)
