"""Matrix products with weights in the checkpoint's [out, in] layout, and the one precision rule.

bfloat16 and float16 products accumulate in float32 inside XLA's GEMMs on CPU and GPU whatever the
result type, so the result is asked for in the model's dtype: asking for float32 and casting would
write twice the bytes. float32 products ask for HIGHEST, or an NVIDIA GPU would use TF32.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


def project(
    equation: str,
    x: jax.Array,
    weight: nnx.Param,
    bias: nnx.Param | None = None,
    *,
    out_dtype: DTypeLike | None = None,
) -> jax.Array:
    """`einsum(equation, x, weight) + bias` in `out_dtype`, by default that of `x`."""
    exact = x.dtype == jnp.float32
    y = jnp.einsum(
        equation,
        x,
        weight[...],
        precision=jax.lax.Precision.HIGHEST if exact else None,
        preferred_element_type=out_dtype or x.dtype,
    )
    return y if bias is None else y + bias[...].astype(y.dtype)
