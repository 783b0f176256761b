"""Which of an operation's two implementations a trace uses: the one switch for all kernels.

`reference` is plain jax.numpy, runs everywhere and is the truth in tests. `fast` is written for
CUDA GPUs (Pallas-Triton, which jax has deprecated for removal: a successor replaces it here and
nowhere else). The choice is made when a function is traced: `fast` where jax's default backend is
a GPU, `reference` elsewhere, unless a test or a benchmark says otherwise:

    with backend.use("fast"):          # also traces kernels for CUDA on a machine without a GPU
        jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",))
    with backend.use("interpret"):     # runs the kernels' semantics on a CPU, slowly
        f(*args)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import jax

Backend = Literal["reference", "fast", "interpret"]

_forced: ContextVar[Backend | None] = ContextVar("jaxserve_ops_backend", default=None)


def chosen() -> Backend:
    """The implementation to trace now."""
    return _forced.get() or ("fast" if jax.default_backend() == "gpu" else "reference")


@contextmanager
def use(backend: Backend) -> Iterator[None]:
    """Force one implementation for what this thread traces inside the block.

    A function that jax has already traced for the same shapes keeps the choice made then.
    """
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)
