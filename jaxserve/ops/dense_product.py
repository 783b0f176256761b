"""A product with a weight in the checkpoint's [out, in] layout, and the one precision rule.

bfloat16 and float16 products accumulate in float32 inside XLA's GEMMs on CPU and GPU whatever the
result type, so the result is asked for in the model's dtype: asking for float32 and casting would
write twice the bytes. float32 products ask for HIGHEST, or an NVIDIA GPU would use TF32.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike


def multiply(x_TI: jax.Array, weight_OI: jax.Array, out_dtype: DTypeLike) -> jax.Array:
    """[T, out] in `out_dtype`."""
    return jnp.einsum(
        "ti,oi->to",
        x_TI,
        weight_OI,
        precision=lax.Precision.HIGHEST if x_TI.dtype == jnp.float32 else None,
        preferred_element_type=out_dtype,
    )
