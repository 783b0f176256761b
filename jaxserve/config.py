"""The configuration of one server: one declaration gives the YAML keys, the flags and the keywords.

`ServerConfig.from_command_line(argv)` reads flags over an optional `--config file.yaml`;
`ServerConfig.from_keywords(...)` is what `jaxserve.Engine(...)` takes. All three use the same
names and the same aliases. A wrong key, type or value raises ConfigError, which says key, value
and what would be valid. Nothing here imports jax.
"""

import argparse
import dataclasses
import logging
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import yaml

from jaxserve import foreign_flags, speculation

logger = logging.getLogger(__name__)


class ConfigError(ValueError):
    """The operator's mistake: the message names the key, the value and the valid choices."""


def key(
    default: Any,
    help: str,
    *,
    aliases: tuple[str, ...] = (),
    least: float | None = None,
    other_names: Mapping[Any, str] = types.MappingProxyType({}),
) -> Any:
    """A configuration key. `aliases` are other spellings, `least` the smallest valid number, `other_names`
    those of values."""
    metadata = {"help": help, "aliases": aliases, "least": least, "other_names": other_names}
    return field(default=default, metadata=metadata)


ReasoningParser = Literal[
    "deepseek-r1", "deepseek-v3", "glm45", "gpt-oss", "kimi", "kimi_k2", "minimax", "qwen3",
    "qwen3-thinking", "step3",
]  # fmt: skip
ToolCallParser = Literal[
    "deepseekv3", "deepseekv31", "glm45", "gpt-oss", "hermes", "kimi_k2", "llama3", "minimax-m2",
    "mistral", "qwen", "qwen25", "qwen3_coder",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    # What is served
    model_path: str = key(
        "", "Hugging Face directory or hub id, GGUF file, or converted checkpoint", aliases=("model",)
    )
    tokenizer_path: str | None = key(None, "directory of tokenizer files; default: the model's")
    served_model_name: str | None = key(None, "name in the OpenAI API; default: the model path")
    revision: str | None = key(None, "branch, tag or commit on the hub")
    chat_template: str | None = key(None, "file with a Jinja chat template; default: the tokenizer's")
    reasoning_parser: ReasoningParser | None = key(  # noqa: RUF009 (as all others)
        None, "whose tags take thoughts out of chat answers, as reasoning_content; default: they stay"
    )
    tool_call_parser: ToolCallParser | None = key(  # noqa: RUF009
        None, "whose format of calls is read from chat answers, as tool_calls; default: no tools"
    )
    grammar_backend: Literal["llguidance", "xgrammar", "outlines", "none"] = key(
        "llguidance",
        "llguidance serves for the others too; none: no json_schema, regex, ebnf, structural_tag",
    )
    constrained_json_disable_any_whitespace: bool = key(
        False, "JSON that a schema asks for is written without white space between its tokens"
    )
    skip_tokenizer_init: bool = key(False, "token ids in, token ids out: load no tokenizer")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = key(
        "auto",
        "auto: the checkpoint's on GPU, bfloat16 for float32's; float32 on CPU",
        other_names={"half": "float16", "float": "float32"},
    )
    load_format: Literal["auto", "safetensors", "gguf", "orbax", "dummy"] = key(
        "auto", "dummy: random weights of the right shapes"
    )
    dequantize_weights: bool = key(
        False, "widen weights in float8 blocks, MXFP4 or integers when they are loaded"
    )
    quantization: Literal["fp8", "int8", "int4", "mxfp4"] | None = key(
        None,
        "fp8, int8: keep linear weights in 8 bits with a scale a channel; int4, mxfp4: keep a checkpoint's "
        "own 4 bits, as is done anyway on Hopper GPUs; default: as the checkpoint has them",
    )
    context_length: int | None = key(None, "longest sequence in tokens; default: the model's own", least=2)
    sampling_defaults: Literal["model", "openai"] = key(
        "model", "model: defaults from generation_config.json"
    )
    random_seed: int | None = key(
        None,
        "seed of what requests without one draw, another on each replica, and of dummy weights; default: "
        "drawn by the system, and 0 for dummy weights",
    )

    # Where it listens
    host: str = key("0.0.0.0", "address to listen on")
    port: int = key(30000, "port to listen on", least=0)
    api_key: str | None = key(None, "bearer token that every request must carry; default: open")
    cors_allowed_origins: tuple[str, ...] = key((), "origins that browsers may call from; * for any")
    stream_interval: int = key(1, "tokens between two events of a stream", least=1)
    max_queued_requests: int = key(4096, "requests that may wait; one more is answered 503", least=1)
    shutdown_grace_period_secs: float = key(
        30.0, "how long requests that were taken may finish after SIGTERM", least=0
    )
    log_level: Literal["debug", "info", "warning", "error"] = key("info", "what is logged")
    log_requests: bool = key(False, "log a line for every request for tokens, when it has ended")

    # Devices and layout
    device: Literal["auto", "cpu", "cuda"] = key("auto", "auto: CUDA where there is a GPU")
    base_gpu_id: int = key(0, "first GPU of this instance", least=0)
    tp: int = key(1, "devices of the instance", aliases=("tp_size", "tensor_parallel_size"), least=1)
    dp_size: int = key(1, "data-parallel ranks", aliases=("dp", "data_parallel_size"), least=1)
    enable_dp_attention: bool = key(False, "attention data-parallel over dp_size groups of the tp devices")
    ep: int = key(1, "expert-parallel size", aliases=("ep_size", "expert_parallel_size"), least=1)
    moe_a2a_backend: Literal["none", "allgather", "all_to_all", "ragged", "deepep"] | None = key(
        None, "expert dispatch; default: chosen by layout; ragged: for GPUs, slower on two of one host"
    )
    moe_runner_backend: str | None = key(
        None, "grouped GEMM of the experts; names of other runtimes are mapped to ours"
    )
    disable_custom_all_reduce: bool = key(
        False, "let XLA make all collectives; default: GPUs of one process exchange small arrays themselves"
    )
    enable_two_batch_overlap: bool = key(False, "run each step as two interleaved half batches")
    enable_eplb: bool = key(False, "replicate and move hot experts")
    ep_num_redundant_experts: int = key(0, "extra physical experts for --enable-eplb", least=0)
    eplb_rebalance_num_iterations: int = key(1000, "steps between two balancings of the experts", least=1)
    eplb_rebalance_layers_per_chunk: int = key(
        1,
        "layers whose experts move between two steps: more end a balancing sooner and pause longer",
        least=1,
    )
    nnodes: int = key(1, "hosts of the instance", least=1)
    node_rank: int = key(0, "this host's number", least=0)
    dist_init_addr: str | None = key(
        None, "host:port of host 0's coordinator; the port after it carries the step plans"
    )
    dist_timeout: float = key(300.0, "seconds that hosts wait for each other at the start", least=1)
    follower_health_port: int | None = key(
        None, "port for GET /health on the hosts without HTTP, node_rank > 0; default: none", least=0
    )

    # Speculative decoding
    speculative_algorithm: Literal["NGRAM", "NEXTN", "EAGLE"] | None = key(
        None,
        "who guesses the next tokens, which one step then checks. NGRAM: the request's own text; NEXTN, also "
        "called EAGLE: the model's own layer for multi-token prediction (DeepSeek V3)",
    )
    speculative_num_draft_tokens: int | None = key(
        None, "tokens of a request in one step, its last one and the guesses; default 8, NEXTN 2", least=2
    )
    speculative_num_steps: int | None = key(
        None, "guesses that NEXTN makes one after the other: one less than the draft tokens", least=1
    )
    speculative_eagle_topk: int | None = key(None, "guesses of one position; only 1 is served", least=1)
    speculative_draft_model_path: str | None = key(
        None, "only the model path is served, where NEXTN's layer is"
    )
    speculative_ngram_min_match_window_size: int | None = key(
        None, "tokens that must have come before for NGRAM to guess; default 2", least=1
    )
    speculative_ngram_max_match_window_size: int | None = key(
        None, "tokens that NGRAM compares to choose among places; default 12", least=1
    )
    speculative_max_rows: int | None = key(
        None,
        "rows of a step on one dp rank, guesses included, above which there are none; default 64",
        least=2,
    )

    # Memory and batches
    num_continuous_decode_steps: int | None = key(
        None,
        "decode steps of one launch while nothing else is to do: less host time a token, tokens in bursts; "
        "default 1, more for small models on a GPU",
        least=1,
    )
    mem_fraction_static: float | None = key(
        None, "share of device memory for weights and KV; default 0.88 on GPU, 0.25 of the host's on CPU"
    )
    kv_cache_dtype: Literal["auto", "bfloat16", "fp8_e4m3"] = key(
        "auto", "of keys and values in the cache; auto: the model's; fp8_e4m3 holds twice bfloat16's tokens"
    )
    page_size: int = key(16, "tokens of a KV page, the grain of prefix sharing", least=1)
    max_total_tokens: int | None = key(
        None, "KV capacity of one dp rank in tokens; default: what memory holds", least=1
    )
    max_running_requests: int | None = key(
        None,
        "rows of one dp rank's running batch; default 256 on GPU, 32 on CPU and with recurrent states",
        least=1,
    )
    chunked_prefill_size: int | None = key(
        None,
        "tokens of one step on one dp rank: decode rows, and prompts; default 2048 on GPU, 256 on CPU",
        least=16,
    )
    disable_radix_cache: bool = key(False, "share no prefixes")
    compile_cache_dir: str | None = key(
        None, "where compiled programs are kept; default: the user's cache directory"
    )

    # ---- where values come from ----

    @classmethod
    def from_command_line(cls, argv: Sequence[str] | None = None, prog: str | None = None) -> "ServerConfig":
        """Flags over `--config` over defaults. Exits with usage on a flag error, as argparse does."""
        parser = cls.parser(prog)
        given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
        path = given.pop("config", None)
        try:
            values = read_yaml(path) if path else {}
            return cls.from_keywords(**{**_by_name(cls, values), **given})
        except ConfigError as error:
            parser.error(str(error))

    @classmethod
    def from_keywords(cls, **values: Any) -> "ServerConfig":
        """Keywords or YAML keys; `tp_size` and the other aliases work. Raises ConfigError."""
        named = _by_name(cls, values)
        hints = typing.get_type_hints(cls)
        config = cls(**{name: _checked(name, value, hints[name]) for name, value in named.items()})
        config.check()
        return config

    @classmethod
    def parser(cls, prog: str | None = None) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(prog=prog, allow_abbrev=False)
        parser.add_argument("--config", help="YAML file with the same keys; flags override it")
        add_flags(parser, cls)
        for name in (*foreign_flags.WITHOUT_EFFECT, *foreign_flags.REFUSED):
            parser.add_argument(
                f"--{name.replace('_', '-')}", dest=name, nargs="*", default=None, help=argparse.SUPPRESS
            )
        return parser

    def check(self) -> None:
        """Everything that can be judged from the configuration alone. Raises ConfigError."""
        if not self.model_path:
            raise ConfigError(
                "model_path is missing; name a directory, a hub id, a GGUF file or a converted checkpoint"
            )
        for f in dataclasses.fields(self):
            value, least = getattr(self, f.name), f.metadata["least"]
            if least is not None and value is not None and value < least:
                raise ConfigError(f"{f.name}={value} is too small; {least} is the least")
        if self.mem_fraction_static is not None and not 0 < self.mem_fraction_static < 1:
            raise ConfigError(f"mem_fraction_static={self.mem_fraction_static} must lie between 0 and 1")
        if self.port > 65535:
            raise ConfigError(f"port={self.port} must be 65535 or less")
        if self.page_size & (self.page_size - 1):
            raise ConfigError(f"page_size={self.page_size} must be a power of two, such as 16 or 64")
        if not 0 <= self.node_rank < self.nnodes:
            raise ConfigError(
                f"node_rank={self.node_rank} must lie in 0..{self.nnodes - 1} (nnodes={self.nnodes})"
            )
        if self.nnodes > 1 and not self.dist_init_addr:
            raise ConfigError("dist_init_addr is missing; with nnodes > 1 name host 0 as host:port")
        if self.tp % self.nnodes:
            raise ConfigError(
                f"tp={self.tp} does not divide over nnodes={self.nnodes}; every host has as many devices"
            )
        if self.nnodes > 1 and self.dp_size > 1 and not self.enable_dp_attention:
            raise ConfigError(
                f"dp_size={self.dp_size} without enable_dp_attention makes full replicas, each on one host; "
                f"with nnodes={self.nnodes} set enable_dp_attention, or start a server on each host"
            )
        if self.enable_dp_attention and self.tp % self.dp_size:
            valid = [d for d in range(1, self.tp + 1) if self.tp % d == 0]
            raise ConfigError(
                f"Constraint tp_size % dp_size == 0 not satisfied: tp={self.tp}, dp_size={self.dp_size}; "
                f"use dp_size {', '.join(map(str, valid))}"
            )
        if self.tp % self.ep:
            valid = [e for e in range(1, self.tp + 1) if self.tp % e == 0]
            raise ConfigError(
                f"ep={self.ep} does not divide tp={self.tp}; use ep {', '.join(map(str, valid))}"
            )
        if self.enable_eplb and self.ep == 1:
            raise ConfigError(
                "enable_eplb needs ep > 1; with ep=1 every device has a share of all experts: loads are even"
            )
        if self.ep_num_redundant_experts and not self.enable_eplb:
            raise ConfigError(
                f"ep_num_redundant_experts={self.ep_num_redundant_experts} needs enable_eplb, "
                "which decides whom the extra slots go to"
            )

        if refusal := speculation.refusal(self):
            raise ConfigError(refusal)

    @property
    def attention_dp(self) -> int:
        """Data-parallel attention groups inside the instance; 1 unless both flags are given."""
        return self.dp_size if self.enable_dp_attention else 1

    @property
    def local_devices(self) -> int:
        """The instance's devices on each host."""
        return self.tp // self.nnodes

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def add_flags(parser: argparse.ArgumentParser, cls: type) -> None:
    """One flag a key and alias of a configuration dataclass; absent flags parse to None."""
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        options = [f"--{n.replace('_', '-')}" for n in (f.name, *f.metadata["aliases"])]
        kind, choices, many = _scalar(hints[f.name])
        text = f.metadata["help"].replace("%", "%%")
        if f.default not in (None, "", False, ()):
            text += f" (default {f.default})"
        if kind is bool:
            parser.add_argument(
                *options, dest=f.name, action=argparse.BooleanOptionalAction, default=None, help=text
            )
        else:
            if other_names := f.metadata["other_names"]:
                kind = partial(_named, other_names)
            nargs = "*" if many else None
            parser.add_argument(
                *options, dest=f.name, type=kind, choices=choices, nargs=nargs, default=None, help=text
            )


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError."""
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.safe_load(file)
    except OSError as error:
        raise ConfigError(f"config={path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"config={path}: not YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"config={path}: expected keys and values, got {type(values).__name__}")
    return values


def _by_name(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """Aliases, dashes and other names of values resolved. Raises ConfigError for unknown or doubly given
    keys."""
    fields = {alias: f for f in dataclasses.fields(cls) for alias in (f.name, *f.metadata["aliases"])}
    out: dict[str, Any] = {}
    for given, value in values.items():
        spelled = str(given).replace("-", "_")
        f = fields.get(spelled)
        if f is None and (reason := foreign_flags.WITHOUT_EFFECT.get(spelled)):
            logger.warning("%s changes nothing here: %s", spelled, reason)
            continue
        if f is None and (cure := foreign_flags.REFUSED.get(spelled)):
            raise ConfigError(f"{spelled} is not supported: {cure}")
        if f is None:
            raise ConfigError(
                f"unknown key {given!r}; known keys: {', '.join(f.name for f in dataclasses.fields(cls))}"
            )
        if f.name in out:
            raise ConfigError(f"{f.name} is given twice (once as {given!r})")
        out[f.name] = _named(f.metadata["other_names"], value)
    return out


def _named(other_names: Mapping[Any, str], value: Any) -> Any:
    return other_names.get(value, value) if isinstance(value, str) else value


def _scalar(hint: Any) -> tuple[Any, list[Any] | None, bool]:
    """(type, choices, many) of a key's annotation: a scalar, a Literal of strings, either with None, or a
    tuple of scalars."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    if typing.get_origin(hint) is Literal:
        return str, list(typing.get_args(hint)), False
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], None, True
    return hint, None, False


def _checked(name: str, value: Any, hint: Any) -> Any:
    """The value, a list as a tuple. Raises ConfigError for a wrong type or choice."""
    if value is None and type(None) in typing.get_args(hint):
        return value
    kind, choices, many = _scalar(hint)
    if many:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{name}={value!r} must be a list of {kind.__name__}")
        return tuple(_checked(name, item, kind) for item in value)
    if choices is not None and value not in choices:
        raise ConfigError(f"{name}={value!r} is not valid; use one of {', '.join(map(repr, choices))}")
    fits = isinstance(value, (int, float)) if kind is float else isinstance(value, kind)
    if not fits or (kind is not bool and isinstance(value, bool)):
        raise ConfigError(f"{name}={value!r} must be of type {kind.__name__}, got {type(value).__name__}")
    return value
