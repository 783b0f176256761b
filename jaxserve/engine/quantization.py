"""Which types of 8 and 4 bits a configuration and a checkpoint ask for: of weights, and of the KV cache."""

import logging
from typing import Any

import jax.numpy as jnp

from jaxserve import speculation
from jaxserve.config import ConfigError, ServerConfig
from jaxserve.layers.channel_quant import ChannelQuant, quantise_model, read_stored
from jaxserve.layers.group_packing import Ways, keep_packed
from jaxserve.layers.group_quant import GroupQuant, read_groups
from jaxserve.mesh import layout_of
from jaxserve.models import declare
from jaxserve.models.decoder import Decoder
from jaxserve.ops import mxfp4

logger = logging.getLogger(__name__)


def declare_model(
    config: ServerConfig, hf_config: dict[str, Any], dtype: Any, has_mxfp4_kernel: bool = True
) -> Decoder:
    """The abstract model, its linear weights as `quantization` or the checkpoint has them.

    Raises ConfigError for what the checkpoint is already, and for an architecture that is not served.
    """
    groups = read_groups(hf_config)
    if groups is None and config.quantization == "int4":
        raise ConfigError("quantization=int4 keeps a checkpoint's own integers of 4 bits; this has none")
    if groups is not None:  # read widened; `keep_groups` declares anew what is not
        hf_config = {key: value for key, value in hf_config.items() if key != "quantization_config"}
    given, asked = hf_config.get("quantization_config") or {}, config.quantization
    stored = read_stored(hf_config)
    if asked and config.dequantize_weights:
        raise ConfigError(f"quantization={asked} and dequantize_weights exclude each other; give one of them")
    if stored is not None:
        if asked not in (None, stored.scheme):
            raise _is_already(asked, f"{stored.scheme} with a scale for each channel or tensor")
        if config.dequantize_weights:
            raise ConfigError(
                "dequantize_weights takes checkpoints with a scale for each block; leave it out"
            )
        hf_config = {key: value for key, value in hf_config.items() if key != "quantization_config"}
    if config.dequantize_weights and given:
        hf_config = {**hf_config, "quantization_config": {**given, "dequantize": True}}
    if asked == "mxfp4" and not is_mxfp4(hf_config):
        raise ConfigError(
            "quantization=mxfp4 keeps a checkpoint's own numbers in MXFP4, and this one has none; use fp8"
        )
    if is_mxfp4(hf_config) and not why_widened(config, hf_config, dtype, has_mxfp4_kernel):
        hf_config = {**hf_config, "quantization_config": {**given, "keep": True}}
    model = declare(hf_config, dtype, with_nextn=speculation.uses_nextn(config))
    if stored is not None:
        quantise_model(model, stored)
    elif asked and given.get("weight_block_size"):
        if asked != given.get("quant_method"):
            raise _is_already(asked, f"{given.get('quant_method')} with a scale for each block")
        logger.info("quantization=%s: the checkpoint's weights are float8 in blocks, and stay so", asked)
    elif asked in ("fp8", "int8"):
        quantise_model(model, ChannelQuant(asked))
    return model


def keep_groups(
    config: ServerConfig, hf_config: dict[str, Any], model: Decoder, dtype: Any, has_kernel: bool, ways: Ways
) -> None:
    """Keep integers of four bits with scales for groups as they are, where a kernel takes them.

    Raises ConfigError where that is asked for and cannot be.
    """
    groups, asked = read_groups(hf_config), config.quantization == "int4"
    if groups is None:
        return
    if why := _why_groups_are_widened(config, groups, dtype, has_kernel or asked):
        if asked:
            raise ConfigError(f"quantization=int4: {why}; leave it out")
        logger.info("weights are widened from integers of %d bits when they are loaded: %s", groups.bits, why)
        return
    kept, left = keep_packed(model, groups, ways)
    if asked and not kept:
        raise ConfigError("quantization=int4: no weight has whole tiles and groups on a device; leave it out")
    if left:
        logger.info("%d weights are widened when they are loaded: of no whole tiles or groups", left)


def _why_groups_are_widened(
    config: ServerConfig, groups: GroupQuant, dtype: Any, has_kernel: bool
) -> str | None:
    """None where they stay as they are."""
    if config.dequantize_weights or config.quantization not in (None, "int4"):
        return "as the configuration asks"
    if groups.bits != 4:
        return "only those of 4 bits stay as they are"
    if groups.is_ordered:
        return "their inputs are permuted (act-order)"
    if jnp.dtype(dtype).itemsize != 2 or not has_kernel:
        return "its kernel needs bfloat16 or float16, a Hopper GPU and CUDA 13"
    return None


def is_mxfp4(hf_config: dict[str, Any]) -> bool:
    return (hf_config.get("quantization_config") or {}).get("quant_method") == "mxfp4"


def why_widened(
    config: ServerConfig, hf_config: dict[str, Any], dtype: Any, has_mxfp4_kernel: bool
) -> str | None:
    """Why experts of a checkpoint in MXFP4 do not stay so; None where they do."""
    if config.quantization == "mxfp4":
        return None
    if config.quantization or config.dequantize_weights:
        return "as the configuration asks"
    if dtype != jnp.bfloat16 or not has_mxfp4_kernel:
        return "its kernel needs bfloat16, a Hopper GPU and CUDA 13"
    _, _, tp = layout_of(config).shape
    ways = tp if config.ep > 1 else config.tp
    if hf_config.get("intermediate_size", 0) % (mxfp4.GROUP * ways):
        return f"{ways} devices would cut a group of {mxfp4.GROUP} numbers"
    return None


def _is_already(asked: str, kind: str) -> ConfigError:
    return ConfigError(
        f"quantization={asked}: this checkpoint is quantised already, as {kind}; leave quantization out"
    )


def kv_dtype(config: ServerConfig, dtype: Any) -> Any:
    """Of keys, values and latents in the cache."""
    match config.kv_cache_dtype:
        case "auto":
            return dtype
        case "bfloat16":
            return jnp.dtype(jnp.bfloat16)
        case "fp8_e4m3":
            return jnp.dtype(jnp.float8_e4m3fn)
