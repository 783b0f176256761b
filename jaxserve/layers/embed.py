"""The vocabulary at both ends of a model: token embedding and output head."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jaxserve.layers.linear import project
from jaxserve.layers.step_context import StepContext
from jaxserve.layers.weight import weight
from jaxserve.mesh import GROUP
from jaxserve.parallel.links import LinkArrays, Links


class Vocabulary(nnx.Module):
    """Token embedding and logits, which share one matrix when `tied`.

    `split` gives both matrices rows that no token has, so that every device of a group has as many.
    They end here: no id reads them, and logits are those of the vocabulary alone.

    Args:
        prefix: of the checkpoint's `embed_tokens`.
        head: checkpoint tensor of the output head; unused when tied.
        scale: the embedding is multiplied by it, rounded to the model's dtype first (Gemma).
        softcap: logits become softcap * tanh(logits / softcap).
    """

    def __init__(
        self,
        prefix: str,
        vocab: int,
        hidden: int,
        *,
        tied: bool,
        dtype: DTypeLike,
        head: str = "lm_head.weight",
        scale: float | None = None,
        softcap: float | None = None,
    ):
        self.size = vocab
        shape, axes = (vocab, hidden), ("vocab", "embed")
        self.embedding = weight(shape, axes, f"{prefix}embed_tokens.weight", dtype=dtype)
        self.head = None if tied else weight(shape, axes, head, dtype=dtype)
        self.scale = scale
        self.softcap = softcap
        self.by_device: NamedSharding | None = None  # of logits, once they are split

    def split(self, mesh: Mesh | AbstractMesh) -> None:
        """Declare as many rows as an attention group of `mesh` divides; before weights are read."""
        num_devices = mesh.shape["ep"] * mesh.shape["tp"]
        self.embedding = _padded(self.embedding, num_devices)
        self.head = None if self.head is None else _padded(self.head, num_devices)
        self.by_device = NamedSharding(mesh, PartitionSpec("dp", GROUP)) if mesh.size > 1 else None

    def embed(self, token_T: jax.Array, step: StepContext | None = None) -> jax.Array:
        """Embedding rows. Token ids are checked where a request enters; here they are in range."""
        hidden_TD = None if step is None or step.links is None else self._rows_by_links(token_T, step)
        if hidden_TD is None:
            hidden_TD = jnp.take(self.embedding[...], token_T, axis=0, mode="clip")
        if self.scale is None:
            return hidden_TD
        return hidden_TD * jnp.asarray(self.scale, hidden_TD.dtype)

    def _rows_by_links(self, token_T: jax.Array, step: StepContext) -> jax.Array | None:
        """A row is added to the zeros of those who do not have it; None where XLA is to do this."""
        links, matrix_VD = step.links, self.embedding[...]
        assert links is not None
        shape = token_T.shape[0] // step.num_ranks, matrix_VD.shape[1]
        if not links.count(jax.ShapeDtypeStruct(shape, matrix_VD.dtype), GROUP):
            return None

        def on_device(arrays: LinkArrays, last: jax.Array, token_t: jax.Array, matrix_UD: jax.Array) -> Any:
            row_t = token_t - jax.lax.axis_index(GROUP) * matrix_UD.shape[0]
            is_here_t = (row_t >= 0) & (row_t < matrix_UD.shape[0])
            hidden_tD = jnp.where(is_here_t[:, None], jnp.take(matrix_UD, row_t, axis=0, mode="clip"), 0)
            return links.inside(arrays, last).sum(hidden_tD, GROUP)

        specs = *Links.SPECS, PartitionSpec("dp"), PartitionSpec(GROUP)
        links.last = jax.shard_map(
            on_device, mesh=step.mesh, in_specs=specs, out_specs=PartitionSpec("dp"), check_vma=False
        )(links.arrays, links.last, token_T, matrix_VD)
        return links.last

    def logits(self, hidden_RD: jax.Array) -> jax.Array:
        """float32 logits [R, V]."""
        matrix = self.embedding if self.head is None else self.head
        logits_RV = project(hidden_RD, matrix, out_dtype=jnp.float32)
        if self.by_device is not None:
            # Whoever needs whole rows gathers these; unasked, the partitioner gathers the matrix instead.
            logits_RV = jax.lax.with_sharding_constraint(logits_RV, self.by_device)
        logits_RV = logits_RV[:, : self.size]
        if self.softcap is None:
            return logits_RV
        return jnp.tanh(logits_RV / self.softcap) * self.softcap


def _padded(param: nnx.Param, num_devices: int) -> nnx.Param:
    value, stored = param.get_value(), param.stored
    rows = -(-stored[0] // num_devices) * num_devices
    return weight((rows, *stored[1:]), param.logical, *param.sources, dtype=value.dtype, stored=stored)
