"""What all families are: an embedding, blocks in a row, a last norm and a head."""

import jax
from flax import nnx

from jaxserve.layers.embed import Vocabulary
from jaxserve.layers.kv import KVSpec, LatentSpec, StateSpec
from jaxserve.layers.moe import ExpertSpec
from jaxserve.layers.norm import RMSNorm
from jaxserve.layers.overlap import run_blocks
from jaxserve.layers.step_context import StepContext


class Decoder(nnx.Module):
    """A family makes the parts, with abstract weights, and says what an engine must know of them.

    Attributes:
        kv: what is kept of a token.
        states: what some layers keep instead, of a sequence.
        experts: which the engine counts and moves.
        max_position: tokens of the longest sequence that the model was made for.
        unserved: prefixes of tensors that are left out.
        nextn_key: key of config.json with the number of layers that guess the token after next, of a family
            that may read one, see `jaxserve.models`.
    """

    vocabulary: Vocabulary
    blocks: nnx.List
    norm: RMSNorm
    kv: KVSpec | LatentSpec
    num_q_heads: int
    vocab_size: int
    max_position: int
    states: StateSpec | None = None
    experts: ExpertSpec | None = None
    unserved: tuple[str, ...] = ()
    nextn_key: str | None = None

    def __call__(self, token_T: jax.Array, step: StepContext) -> jax.Array:
        """hidden [T, D] after the last norm."""
        hidden_TD = self.vocabulary.embed(token_T, step)
        return self.norm(run_blocks(self.blocks, hidden_TD, step))

    def logits(self, hidden_RD: jax.Array) -> jax.Array:
        """float32 [R, V]."""
        return self.vocabulary.logits(hidden_RD)
