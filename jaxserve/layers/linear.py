"""Matrix products with weights in the checkpoint's [out, in] layout, and the one precision rule.

bfloat16 and float16 products accumulate in float32 inside XLA's GEMMs on CPU and GPU whatever the
result type, so the result is asked for in the model's dtype: asking for float32 and casting would
write twice the bytes. float32 products ask for HIGHEST, or an NVIDIA GPU would use TF32.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


def project(
    x: jax.Array,
    weight: nnx.Param,
    bias: nnx.Param | None = None,
    *,
    out_dtype: DTypeLike | None = None,
) -> jax.Array:
    """x [T, *in] times weight [*out, *in], plus bias [*out]: [T, *out] in `out_dtype`, else x's dtype.

    Several dimensions (heads) are merged to one around the product, which moves no data. A product
    with three-dimensional weights does: XLA's CPU backend copies such a weight in every call
    (SmolLM2-135M, 8 rows: 107 MB copied a step).
    """
    matrix = weight[...]
    out_shape = matrix.shape[: matrix.ndim - (x.ndim - 1)]
    in_size = math.prod(x.shape[1:])
    y = jnp.einsum(
        "ti,oi->to",
        x.reshape(-1, in_size),
        matrix.reshape(-1, in_size),
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=out_dtype or x.dtype,
    ).reshape(-1, *out_shape)
    return y if bias is None else y + bias[...].astype(y.dtype)
