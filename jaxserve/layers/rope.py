"""Rotary position embedding and the scalings of its frequencies that config.json can ask for.

Frequencies are computed once on the host, in float64, and kept as a hashable tuple, so that a
model stays a static structure; angles and sines are float32. `jaxserve.ops` rotates.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.config import ConfigError


@dataclass(frozen=True)
class RopeTable:
    """Cosines and sines of one step's positions, float32 [T, K/2]."""

    cos_TK: jax.Array
    sin_TK: jax.Array


@dataclass(frozen=True)
class Rope:
    """Radians per position of each pair of a head, and a factor on cosine and sine (1 but for YaRN)."""

    frequencies: tuple[float, ...]
    amplitude: float = 1.0

    @classmethod
    def from_parameters(cls, parameters: dict[str, Any], head_dim: int, max_position: int) -> "Rope":
        """From one `rope_parameters` mapping (see `rope_parameters`). Raises ConfigError."""
        kind = parameters["rope_type"]
        if kind not in SCALINGS:
            known = ", ".join(repr(k) for k in SCALINGS)
            raise ConfigError(f"config.json: rope_type={kind!r} is not supported; use one of {known}")
        rotated = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
        if rotated % 2 or not 0 < rotated <= head_dim:
            share = parameters["partial_rotary_factor"]
            raise ConfigError(
                f"config.json: partial_rotary_factor={share} of head_dim={head_dim} rotates {rotated} "
                f"numbers of a head; it must be an even number up to {head_dim}"
            )
        plain = parameters["rope_theta"] ** -(np.arange(0, rotated, 2, dtype=np.float64) / rotated)
        parameters = {"original_max_position_embeddings": max_position, **parameters}
        try:
            with np.errstate(divide="raise", invalid="raise"):
                frequencies, amplitude = SCALINGS[kind](plain, parameters)
        except KeyError as error:
            raise ConfigError(
                f"config.json: rope_type={kind!r} needs {error.args[0]}, which is missing"
            ) from None
        except (ArithmeticError, ValueError) as error:
            raise ConfigError(
                f"config.json: rope_type={kind!r} has numbers that give none: {error}"
            ) from None
        return cls(tuple(frequencies.astype(np.float32).tolist()), amplitude)

    def table(self, position_T: jax.Array) -> RopeTable:
        angle_TK = position_T.astype(jnp.float32)[:, None] * jnp.asarray(self.frequencies, jnp.float32)
        return RopeTable(jnp.cos(angle_TK) * self.amplitude, jnp.sin(angle_TK) * self.amplitude)


def rope_parameters(hf_config: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` of a config.json of either age: always with `rope_type` and `rope_theta`.

    Older files say `rope_theta` and `rope_scaling` (with `type` or `rope_type`), newer ones
    `rope_parameters`. A mapping per layer type (Gemma 3) is the caller's to take apart.

    Raises ConfigError for what would be left out.
    """
    scaling, parameters = (hf_config.get(key) or {} for key in ("rope_scaling", "rope_parameters"))
    given = {**parameters, **scaling}  # where a file has both, the older one was put in by hand
    kinds = (m.get(key) for m in (scaling, parameters) for key in ("rope_type", "type"))
    kind = next((kind for kind in kinds if kind), "default")
    if nested := [key for key, value in given.items() if isinstance(value, dict)]:
        raise ConfigError(f"config.json: rope_parameters for {nested[0]!r} alone are not supported here")
    if kind == "default" and given.get("factor") not in (None, 1):
        raise ConfigError(
            f"config.json: rope_scaling has factor={given['factor']} but no rope_type that would use it"
        )
    theta = given.get("rope_theta") or hf_config.get("rope_theta") or 10_000.0
    if share := hf_config.get("partial_rotary_factor"):
        given = {"partial_rotary_factor": share, **given}
    given = {key: value for key, value in given.items() if value is not None}
    return {**given, "rope_type": kind, "rope_theta": float(theta)}


def _default(plain: np.ndarray, parameters: dict[str, Any]) -> tuple[np.ndarray, float]:
    return plain, 1.0


def _linear(plain: np.ndarray, parameters: dict[str, Any]) -> tuple[np.ndarray, float]:
    """Positions divided by `factor`. Source: Chen et al. 2023, "position interpolation"."""
    return plain / parameters["factor"], 1.0


def _llama3(plain: np.ndarray, parameters: dict[str, Any]) -> tuple[np.ndarray, float]:
    """Long waves divided by `factor`, short ones kept, a linear blend between. Source: Llama 3.1."""
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = parameters["original_max_position_embeddings"] * plain / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return plain * (keep + (1 - keep) / parameters["factor"]), 1.0


def _yarn(plain: np.ndarray, parameters: dict[str, Any]) -> tuple[np.ndarray, float]:
    """Peng et al. 2023, "YaRN", section 3.2 (by parts) and 3.4 (temperature, as an amplitude)."""
    factor, original = parameters["factor"], parameters["original_max_position_embeddings"]
    log_theta, half = math.log(parameters["rope_theta"]), len(plain)

    def pair_that_turns(times: float) -> float:
        """Index of the pair that makes `times` turns within the original context."""
        return half * math.log(original / (times * 2 * math.pi)) / log_theta

    low = pair_that_turns(parameters.get("beta_fast") or 32)
    high = pair_that_turns(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    width = (high - low) or 0.001  # equal bounds: a step instead of a ramp
    interpolate = np.clip((np.arange(half) - low) / width, 0.0, 1.0)
    frequencies = plain * (1 - interpolate) + plain / factor * interpolate

    amplitude = parameters.get("attention_factor")
    if amplitude is None:
        numerator, denominator = parameters.get("mscale"), parameters.get("mscale_all_dim")
        if numerator and denominator:
            amplitude = yarn_amplitude(factor, numerator) / yarn_amplitude(factor, denominator)
        else:  # transformers leaves `attn_factor` out; DeepSeek-R1-0528-Qwen3-8B has one that gives 1
            amplitude = yarn_amplitude(factor, 1.0) * (parameters.get("attn_factor") or 1.0)
    return frequencies, float(amplitude)


def yarn_amplitude(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


SCALINGS: dict[str, Callable[[np.ndarray, dict[str, Any]], tuple[np.ndarray, float]]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
