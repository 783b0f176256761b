"""jaxserve: a JAX/XLA serving engine for large language models.

`jaxserve.Engine` is imported on first use, so that the HTTP process, the text layer and the
configuration can import this package without loading jax.
"""

from typing import TYPE_CHECKING, Any

from jaxserve.version import __version__

if TYPE_CHECKING:
    from jaxserve.offline import Engine

__all__ = ["Engine", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from jaxserve.offline import Engine

        return Engine
    raise AttributeError(f"module 'jaxserve' has no attribute {name!r}")
