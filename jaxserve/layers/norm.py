"""Root-mean-square normalization."""

import jax
from flax import nnx
from jax.typing import DTypeLike

from jaxserve.layers.operand import Operand, Rows, Sum, wide
from jaxserve.layers.weight import weight
from jaxserve.ops import float8_rows
from jaxserve.ops.float8_rows import Float8Rows
from jaxserve.ops.kv_write import HeadNorm
from jaxserve.ops.norm import rms_norm


class RMSNorm(nnx.Module):
    """`jaxserve.ops.norm.rms_norm` with a learned gain.

    `offset` is 1 for families that store the gain's distance from one (Gemma), else 0.
    """

    def __init__(
        self,
        name: str,
        size: int,
        *,
        eps: float,
        dtype: DTypeLike,
        offset: float = 0.0,
        axis: str | None = "embed",
    ):
        self.weight = weight((size,), (axis,), f"{name}.weight", dtype=dtype)
        self.eps = eps
        self.offset = offset

    def __call__(self, x: Rows) -> jax.Array:
        return rms_norm(wide(x), self.weight[...], eps=self.eps, offset=self.offset)

    def of_heads(self) -> HeadNorm:
        """The same, to be applied by who rotates and writes heads."""
        return HeadNorm(self.weight[...], self.eps, self.offset)

    def operand(self, x_TD: Rows) -> "Normalised":
        """The same for products alone, in the form that they want."""
        return Normalised(x_TD, self)


class Normalised(Operand):
    """Rows behind a norm."""

    def __init__(self, x_TD: Rows, norm: RMSNorm):
        super().__init__(x_TD.shape, x_TD.dtype)
        self.x_TD, self.norm = x_TD, norm

    def make_wide(self) -> jax.Array:
        return self.norm(self.x_TD)

    def make_float8(self) -> Float8Rows:
        gain_D, options = self.norm.weight[...], {"eps": self.norm.eps, "offset": self.norm.offset}
        if isinstance(self.x_TD, Sum) and not self.x_TD.is_made:
            return self.x_TD.normalised(gain_D, **options)
        return float8_rows.normalise(wide(self.x_TD), gain_D, **options)
