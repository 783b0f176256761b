"""Kinds of values in config.json's `quantization_config`, checked before anything is read of it."""

import re
from typing import Any

import msgspec

from jaxserve.config import ConfigError


class _Weights(msgspec.Struct):
    symmetric: bool | None = None


class _Group(msgspec.Struct):
    weights: _Weights | None = None


class _Given(msgspec.Struct):
    """What is used of the keys that hold others; whoever reads a number or a word checks that."""

    modules_to_not_convert: list[str] | None = None
    ignored_layers: list[str] | None = None
    ignore: list[str] | None = None
    dynamic: dict[str, dict[str, Any] | None] | None = None
    modules_in_block_to_quantize: list[str | list[str]] | None = None
    config_groups: dict[str, _Group] | None = None
    transform_config: dict[str, Any] | None = None
    sparsity_config: dict[str, Any] | None = None


def quantization_of(hf_config: dict[str, Any]) -> dict[str, Any]:
    """`quantization_config`, or {}. Raises ConfigError that names a key of another kind, or a bad pattern."""
    given = hf_config.get("quantization_config") or {}
    try:
        names = msgspec.convert(given, _Given)
    except msgspec.ValidationError as error:
        raise ConfigError(f"config.json: quantization_config: {error}") from error
    patterns = [name[3:] for name in names.ignore or () if name.startswith("re:")]
    patterns += [key[2:] for key in names.dynamic or () if key.startswith("-:")]
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"config.json: quantization_config: pattern {pattern!r}: {error}") from error
    return given
