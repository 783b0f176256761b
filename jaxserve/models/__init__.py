"""Model families, one file each, found by the `architectures` of a config.json.

A family is a module here with `ARCHITECTURES`, a tuple of names, each the name of a class in it:

    class XForCausalLM(Decoder):
        def __init__(self, hf_config: dict, dtype): ...   # abstract weights, no memory touched

which sets the attributes that `Decoder` names. `QUANTIZATIONS`, where a module has it, are the methods of
`quantization_config` that its classes read.

A class with `nextn_key` takes a keyword `with_nextn`: to read, too, the layer that guesses the token
after next, of which config.json has the number of layers under that key. It then has

        def next_token(self, token_T, hidden_TD, step) -> hidden_TD   # of the guess

and a layer more in `kv`.
"""

import functools
import importlib
import pkgutil
from types import ModuleType
from typing import Any

from jaxserve.config import ConfigError
from jaxserve.layers.group_quant import METHODS as GROUP_METHODS
from jaxserve.models.decoder import Decoder


class UnknownArchitectureError(ConfigError):
    """No family here serves this checkpoint; the message lists the known architectures."""


def resolve(hf_config: dict[str, Any]) -> type:
    """The model class for a config.json.

    Raises: UnknownArchitectureError; ConfigError for weights in a quantization that the family does
    not read (its module's `QUANTIZATIONS` names those it does).
    """
    quantization = hf_config.get("quantization_config") or {}
    method = quantization.get("quant_method")
    if quantization and method is None:
        raise ConfigError(
            "config.json: quantization_config has no quant_method; use a checkpoint in bfloat16, float16 or "
            "float32, or one that names it"
        )
    wanted = hf_config.get("architectures") or []
    families = _families()
    for name in wanted:
        if name in families:
            known = getattr(families[name], "QUANTIZATIONS", ())
            if method is not None and method not in known:
                also = f" or quantized as {', '.join([*known, GROUP_METHODS])}"
                raise ConfigError(
                    f"config.json: quantization_config with quant_method={method!r} is not supported for "
                    f"{name}; use a checkpoint in bfloat16, float16 or float32{also}"
                )
            return getattr(families[name], name)
    known = ", ".join(sorted(families))
    given = f"architectures={wanted!r} is unknown" if wanted else "architectures is missing"
    raise UnknownArchitectureError(f"config.json: {given}; known: {known}")


def declare(hf_config: dict[str, Any], dtype: Any, *, with_nextn: bool = False) -> Decoder:
    """The abstract model of a config.json.

    Raises: as `resolve`; ConfigError when there is no layer for multi-token prediction to read.
    """
    family = resolve(hf_config)
    if not with_nextn:
        return family(hf_config, dtype)
    key = family.nextn_key
    if key is None:
        raise ConfigError(
            f"speculative_algorithm=NEXTN: no layer for multi-token prediction is served of "
            f"{family.__name__}, only of DeepSeek's; use 'NGRAM'"
        )
    if not hf_config.get(key):
        raise ConfigError(
            f"speculative_algorithm=NEXTN: config.json: {key}={hf_config.get(key)} says that this checkpoint "
            "has no layer for multi-token prediction; use 'NGRAM'"
        )
    return family(hf_config, dtype, with_nextn=True)


@functools.cache
def _families() -> dict[str, ModuleType]:
    """Architecture -> the module that declares it."""
    families: dict[str, ModuleType] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for name in getattr(module, "ARCHITECTURES", ()):
            assert name not in families, f"{name} is declared in {families[name]} and {module}"
            families[name] = module
    return families
