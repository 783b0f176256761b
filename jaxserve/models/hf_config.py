"""Reading config.json: the keys that all families share, old and new spellings, clear refusals."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from jaxserve.config import ConfigError
from jaxserve.layers.rope import Rope, rope_parameters


@dataclass(frozen=True)
class Dimensions:
    """Sizes of a decoder, by the letters of their axes."""

    D: int
    F: int
    H: int
    G: int
    K: int
    V: int
    num_layers: int
    eps: float
    max_position: int

    @classmethod
    def read(cls, config: dict[str, Any]) -> "Dimensions":
        """Raises ConfigError when a key is missing or no size, or sizes do not fit each other."""
        D, H = need_size(config, "hidden_size"), need_size(config, "num_attention_heads")
        G = need_size(config, "num_key_value_heads") if config.get("num_key_value_heads") else H
        K = need_size(config, "head_dim") if config.get("head_dim") else D // H
        if H % G:
            raise ConfigError(
                f"config.json: num_attention_heads={H} is not a multiple of num_key_value_heads={G}"
            )
        if K % 2:
            raise ConfigError(f"config.json: head_dim={K} is odd; rotary embedding needs pairs")
        return cls(
            D=D,
            F=need_size(config, "intermediate_size"),
            H=H,
            G=G,
            K=K,
            V=need_size(config, "vocab_size"),
            num_layers=need_size(config, "num_hidden_layers"),
            eps=config.get("rms_norm_eps", 1e-6),
            max_position=need_size(config, "max_position_embeddings"),
        )

    @property
    def heads(self) -> dict[str, Any]:
        """As the keywords of `Attention`."""
        return {"hidden": self.D, "num_q_heads": self.H, "num_kv_heads": self.G, "head_dim": self.K}


def need(config: dict[str, Any], key: str) -> Any:
    if config.get(key) is None:
        raise ConfigError(f"config.json: {key} is missing")
    return config[key]


def need_size(config: dict[str, Any], key: str) -> int:
    value = need(config, key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"config.json: {key}={value!r} must be a positive integer")
    return value


def num_experts(config: dict[str, Any]) -> int:
    """Number of routed experts, under any of the names that files give it."""
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if config.get(key) is not None:
            return config[key]
    return need(config, "num_experts")


def routing_groups(config: dict[str, Any]) -> dict[str, Any]:
    """`n_group` and `topk_group` as the keywords of `Routing`. Raises ConfigError when they do not fit."""
    groups, best, experts = config.get("n_group") or 1, config.get("topk_group") or 1, num_experts(config)
    if experts % groups or not 1 <= best <= groups:
        raise ConfigError(
            f"config.json: n_group={groups} must divide the {experts} experts and topk_group={best} lie in "
            f"1..{groups}"
        )
    return {"num_groups": groups, "top_groups": best}


def extra_layers(config: dict[str, Any]) -> tuple[str, ...]:
    """Prefixes of the multi-token prediction layers, which checkpoints number after the last layer."""
    first, extra = need(config, "num_hidden_layers"), config.get("num_nextn_predict_layers") or 0
    return tuple(f"model.layers.{first + n}." for n in range(extra))


def one_of(config: dict[str, Any], key: str, valid: Collection[Any], default: Any) -> Any:
    """`config[key]` (or the default). Raises ConfigError when it is not a valid choice."""
    value = config.get(key)
    value = default if value is None else value
    if value not in valid:
        choices = ", ".join(map(repr, valid))
        raise ConfigError(f"config.json: {key}={value!r} is not supported; use one of {choices}")
    return value


def rope_and_reach(config: dict[str, Any], size: Dimensions) -> tuple[Rope, int]:
    """The rotary embedding of all layers, and the longest sequence it was made for (tokens).

    A YaRN file may still say the unscaled length in `max_position_embeddings`.
    """
    parameters = rope_parameters(config)
    rope = Rope.from_parameters(parameters, size.K, size.max_position)
    reach = size.max_position
    if parameters["rope_type"] == "yarn":
        original = parameters.get("original_max_position_embeddings", reach)
        reach = max(reach, int(parameters["factor"] * original))
    return rope, reach


def windows(config: dict[str, Any], size: Dimensions, sliding: list[bool]) -> list[int | None]:
    """The attention window of each layer: `sliding_window` where `layer_types`, or else `sliding`, says so.

    Raises ConfigError for another kind of layer.
    """
    kinds = config.get("layer_types")
    if kinds is not None:
        known = {"full_attention": False, "sliding_attention": True}
        if unknown := sorted(set(kinds) - known.keys()):
            choices = ", ".join(map(repr, known))
            raise ConfigError(f"config.json: layer_types={unknown[0]!r} is not supported; use {choices}")
        if len(kinds) != size.num_layers:
            raise ConfigError(
                f"config.json: layer_types has {len(kinds)} entries, num_hidden_layers={size.num_layers}"
            )
        sliding = [known[kind] for kind in kinds]
    if not any(sliding):
        return [None] * size.num_layers
    window = need_size(config, "sliding_window")
    return [window if slides else None for slides in sliding]


def upper_layer_windows(config: dict[str, Any], size: Dimensions) -> list[int | None]:
    """Qwen's rule: no window unless `use_sliding_window`, then on layers from `max_window_layers` on."""
    if not config.get("use_sliding_window", False):
        return [None] * size.num_layers
    first = config.get("max_window_layers", 28)
    return windows(config, size, [layer >= first for layer in range(size.num_layers)])
