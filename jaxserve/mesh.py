"""The mesh of one model instance: its axes, the layout of a configuration, and the sharding rules.

N devices form `Mesh((dp, ep, tp))`. Attention is data-parallel over `dp`; heads, vocabulary and
dense FFN are split over (`ep`, `tp`); experts over (`dp`, `ep`) and their FFN over `tp`, or, with
ep = 1, expert FFN over all three axes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxserve.config import ConfigError, ServerConfig

AXES = ("dp", "ep", "tp")
GROUP = ("ep", "tp")  # the axes inside one attention group


@dataclass(frozen=True)
class Layout:
    """How `num_devices` are divided: `dp` attention groups, experts over `ep` devices."""

    num_devices: int
    dp: int = 1
    ep: int = 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """(dp, ep, tp) sizes; `ep` counts only what lies inside an attention group."""
        inner = self.ep // self.dp if self.ep > 1 else 1
        return self.dp, inner, self.num_devices // (self.dp * inner)

    @property
    def group(self) -> int:
        """Devices of one attention group."""
        return self.num_devices // self.dp


def layout_of(config: ServerConfig) -> Layout:
    """The layout a configuration asks for. Raises ConfigError before any weight is read."""
    dp, ep, tp = config.attention_dp, config.ep, config.tp
    if ep > 1 and ep % dp:
        valid = [e for e in range(1, tp + 1) if tp % e == 0 and (e == 1 or e % dp == 0)]
        raise ConfigError(f"ep={ep} is not a multiple of dp_size={dp}; use ep {', '.join(map(str, valid))}")
    return Layout(num_devices=tp, dp=dp, ep=ep)


def make_mesh(layout: Layout, devices: Sequence[Any]) -> Mesh:
    """Raises ConfigError when there are fewer devices than the layout needs."""
    if len(devices) < layout.num_devices:
        raise ConfigError(
            f"tp={layout.num_devices} needs {layout.num_devices} devices, but {len(devices)} "
            f"({devices[0].device_kind}) are there; use tp {len(devices)} or less"
        )
    grid = np.array(devices[: layout.num_devices]).reshape(layout.shape)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


Rules = dict[str, tuple[str, ...]]


def rules(layout: Layout, *, num_q_heads: int, num_kv_heads: int, num_experts: int | None = None) -> Rules:
    """Logical axis -> mesh axes, for a model on a layout. `num_experts` is None for a dense model.

    KV heads are replicated when the group does not divide them; the vocabulary is padded
    (`Vocabulary.split`). Raises ConfigError for query heads or experts that do not divide.
    """
    if num_experts is not None and num_experts % layout.ep:
        valid = [e for e in range(1, layout.num_devices + 1) if layout.num_devices % e == 0]
        valid = [e for e in valid if num_experts % e == 0 and (e == 1 or e % layout.dp == 0)]
        raise ConfigError(
            f"{num_experts} experts do not divide over ep={layout.ep}; use ep {', '.join(map(str, valid))}"
        )
    if num_q_heads % layout.group:
        valid = [d for d in range(1, layout.num_devices + 1) if num_q_heads % d == 0]
        raise ConfigError(
            f"{num_q_heads} attention heads do not divide over {layout.group} devices of an attention group "
            f"(tp={layout.num_devices}, dp={layout.dp}); use groups of {', '.join(map(str, valid))}"
        )
    with_ep = layout.ep > 1
    return {
        "batch": ("dp",),
        "kv_page": ("dp",),
        "embed": (),
        "q_heads": GROUP,
        "kv_heads": GROUP if num_kv_heads % layout.group == 0 else (),
        "vocab": GROUP,
        "ffn": GROUP,
        "expert": ("dp", "ep") if with_ep else (),
        "expert_ffn": ("tp",) if with_ep else AXES,
    }


def weight_sharding(mesh: Mesh | AbstractMesh, table: Rules, param: nnx.Param) -> NamedSharding:
    """The sharding of a declared weight. Raises ConfigError when a dimension does not divide."""
    spec = []
    for size, axis in zip(param.get_value().shape, param.logical, strict=True):
        axes = () if axis is None else table[axis]
        ways = int(np.prod([mesh.shape[a] for a in axes]))
        if size % ways:
            cure = ""
            if param.sources[0].endswith("_scale_inv"):
                cure = ": a block of float8 weights has one scale; use a larger ep, or --dequantize-weights"
            elif param.get_value().dtype == np.uint8:
                cure = ": 32 numbers of MXFP4 have one; use a larger ep, or leave --quantization mxfp4 out"
            raise ConfigError(
                f"{param.sources[0]}: dimension {axis}={size} does not divide over {ways} devices{cure}"
            )
        spec.append(axes or None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def per_rank(mesh: Mesh | None, function: Callable, *args: Any) -> Any:
    """Run `function` on each dp rank's part (axis 0) of every argument and result."""
    if mesh is None:
        return function(*args)
    spec = PartitionSpec("dp")
    return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(*args)
