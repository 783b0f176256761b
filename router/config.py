"""The configuration of one gateway: one declaration gives the YAML keys, the flags and the keywords.

`RouterConfig.from_command_line(argv)` reads flags over an optional `--config file.yaml`. A wrong key,
type or value raises ConfigError, which says key, value and what would be valid. With `prefix="router-"`
the same flags are read as `--router-policy` and so on, which is what the co-launcher takes.
"""

import argparse
import dataclasses
import re
import ssl
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from router.certificates import load_chain, workers_tls
from router.upstream import KEY_PATTERN, Address

PolicyName = Literal[
    "cache_aware",
    "cache_aware_threshold",
    "round_robin",
    "random",
    "power_of_two",
    "least_load",
    "prefix_hash",
    "consistent_hashing",
    "manual",
]
POLICIES: tuple[str, ...] = typing.get_args(PolicyName)

_PROXY = "put a proxy that checks tokens in front, and see --control-plane-api-keys for roles"
_PD = "prefill and decode are not split over workers; give each worker its own --worker-urls entry"
REFUSED = {
    "jwt-issuer": _PROXY, "jwt-audience": _PROXY, "jwt-jwks-uri": _PROXY, "jwt-role-mapping": _PROXY,
    "tenant-api-key": "use --api-keys name:token; --rate-limit-tokens-per-second holds for each name",
    "pd-disaggregation": _PD, "prefill": _PD, "decode": _PD, "prefill-policy": _PD, "decode-policy": _PD,
    "history-backend": "conversations are not stored; clients send their messages",
    "enable-igw": "workers of several models are routed to by model name without it",
}  # fmt: skip


class ConfigError(ValueError):
    """The operator's mistake: the message names the key, the value and the valid choices."""


def key(default: Any, help: str, *, aliases: tuple[str, ...] = (), least: float | None = None) -> Any:
    """A configuration key. `aliases` are other spellings, `least` the smallest valid number."""
    metadata = {"help": help, "aliases": aliases, "least": least}
    if isinstance(default, (list, tuple)):
        return field(default_factory=lambda: tuple(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    # Where it listens
    host: str = key("0.0.0.0", "address to listen on")
    port: int = key(30000, "port to listen on", least=0)
    workers_processes: int = key(1, "gateway processes that share the port; more use more cores", least=1)
    client_header_timeout_secs: float = key(
        30.0, "how long a client may take to send a request's head; then 408", least=0.01
    )
    worker_urls: tuple[str, ...] = key((), "workers to route to, such as http://worker1:8000")
    log_level: Literal["debug", "info", "warning", "error"] = key("info", "what is logged")
    log_json: bool = key(False, "log one JSON object a line")
    max_payload_size: int = key(512 << 20, "largest request body in bytes", least=1)
    request_timeout_secs: float = key(1800.0, "longest life of one request", least=0.001)
    shutdown_grace_period_secs: float = key(180.0, "how long requests may run on after SIGTERM", least=0)
    request_id_headers: tuple[str, ...] = key(
        ("x-request-id", "x-correlation-id", "x-trace-id", "request-id"),
        "headers a client's request id is taken from, first match first",
    )
    cors_allowed_origins: tuple[str, ...] = key((), "origins that browsers may call from; * for any")
    tls_cert_path: str | None = key(None, "PEM certificate chain to serve HTTPS with")
    tls_key_path: str | None = key(None, "PEM key of --tls-cert-path")
    enable_trace: bool = key(False, "export OpenTelemetry spans")
    otlp_traces_endpoint: str = key("localhost:4318", "collector of OTLP over HTTP, JSON encoded")
    ca_cert_paths: tuple[str, ...] = key((), "PEM certificates that https workers are checked against")
    client_cert_path: str | None = key(None, "PEM certificate that the gateway shows to https workers")
    client_key_path: str | None = key(None, "PEM key of --client-cert-path")
    prometheus_host: str = key("0.0.0.0", "address of --prometheus-port")
    prometheus_port: int | None = key(
        None, "a second port that serves only /metrics; default: /metrics of the main port", least=0
    )

    # How it chooses
    policy: PolicyName = key("round_robin", "how a worker is chosen")  # noqa: RUF009
    dp_aware: bool = key(False, "choose a data-parallel rank inside each worker as well")
    cache_threshold: float | None = key(
        None, "cache_aware_threshold: matched share that follows the cache; default 0.5", least=0
    )
    balance_abs_threshold: int | None = key(
        None, "cache_aware_threshold: difference of in-flight requests that is too much; default 32", least=0
    )
    balance_rel_threshold: float | None = key(
        None, "cache_aware_threshold: ratio of in-flight requests that is too much; default 1.5", least=0
    )
    eviction_interval_secs: float = key(120.0, "pause between two sweeps of the prefix tree", least=0.001)
    max_tree_size: int = key(67108864, "prompt characters remembered over all workers", least=256)
    prefill_window_tokens: int | None = key(
        None,
        "cache_aware: prompt tokens of streams sent to a worker ahead of their first tokens; more wait "
        "in the gateway, best cached first; 0: no waiting; default: two prefill chunks, at least 2048",
        least=0,
    )
    prefix_token_count: int = key(256, "prefix_hash: tokens of the prompt that are hashed", least=1)
    prefix_hash_load_factor: float = key(
        1.25, "prefix_hash: in-flight requests over the mean that make it spill", least=1
    )
    tokenizer_path: str | None = key(
        None, "cache_aware: directory of the tokenizer for exact routing; default: the workers' own, if local"
    )
    assignment_mode: Literal["random", "min_load", "min_group"] = key(
        "random", "manual: where a new routing key goes"
    )
    max_idle_secs: float = key(14400.0, "manual: idle time after which a routing key is forgotten", least=0)

    # Where workers are found
    discovery_file: str | None = key(None, "YAML or JSON file of workers, reread when it changes")
    service_discovery: bool = key(False, "register ready Kubernetes pods that carry --selector's labels")
    selector: tuple[str, ...] = key((), "pod labels, each key=value")
    service_discovery_port: int = key(80, "port of the workers in their pods", least=1)
    service_discovery_namespace: str | None = key(None, "namespace of the pods; default: the gateway's own")
    kubernetes_api_url: str | None = key(None, "API server; default: that of the cluster around the gateway")

    # When a worker is used
    worker_startup_timeout_secs: float = key(
        1800.0, "how long a registered worker may take to become ready", least=0
    )
    health_check_endpoint: str = key("/health", "path that is probed")
    health_check_interval_secs: float | None = key(
        None, "pause between probes of a healthy worker; default: 1 to 5 s, as its traffic asks", least=0.05
    )
    health_check_timeout_secs: float = key(2.0, "a probe that takes longer has failed", least=0.01)
    health_failure_threshold: int = key(2, "failed probes in a row that eject a worker", least=1)
    health_success_threshold: int = key(1, "good probes in a row that bring it back", least=1)
    disable_health_check: bool = key(False, "send no probes to workers that are in use")
    remove_unhealthy_workers: bool = key(False, "unregister an ejected worker")
    disable_circuit_breaker: bool = key(False, "never eject a worker for failed requests")
    cb_failure_threshold: int = key(5, "failed requests in a row that open the breaker", least=1)
    cb_success_threshold: int = key(1, "good probes in a row that close it", least=1)
    cb_timeout_duration_secs: float = key(
        1.0, "open time before the first probe; doubles with every failed one", least=0
    )
    cb_timeout_max_secs: float = key(30.0, "longest open time between two probes", least=0)
    disable_retries: bool = key(False, "never try a second worker")
    retry_max_retries: int = key(5, "attempts at one request in all", least=1)
    retry_initial_backoff_ms: float = key(50.0, "first pause before a worker is tried again", least=0)
    retry_max_backoff_ms: float = key(30000.0, "longest pause", least=0)
    retry_backoff_multiplier: float = key(1.5, "growth of the pause", least=1)
    retry_jitter_factor: float = key(0.2, "random share of the pause, up and down", least=0)

    # Who may ask, and how much
    api_key: str | None = key(None, "bearer token of clients and operators; default: open")
    worker_api_key: str | None = key(None, "bearer token sent to workers that have none of their own")
    api_keys: tuple[str, ...] = key((), "more client keys, each name:token")
    control_plane_api_keys: tuple[str, ...] = key(
        (), "operators' keys, each id:name:role:key, role admin or user; then only admins change workers"
    )
    max_concurrent_requests: int = key(-1, "requests in flight at once; -1: no limit", least=-1)
    queue_size: int = key(100, "requests that may wait for --max-concurrent-requests", least=0)
    queue_timeout_secs: float = key(60.0, "how long they may wait", least=0)
    rate_limit_tokens_per_second: float | None = key(
        None, "prompt and completion tokens a second of one API key; default: no limit", least=0.001
    )

    # ---- where values come from ----

    @classmethod
    def from_command_line(cls, argv: Sequence[str] | None = None, prog: str | None = None) -> "RouterConfig":
        """Flags over `--config` over defaults. Exits with usage on a flag error, as argparse does."""
        parser = cls.parser(prog)
        given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
        path = given.pop("config", None)
        try:
            values = read_yaml(path) if path else {}
            return cls.from_keywords(**{**by_name(cls, values), **given})
        except ConfigError as error:
            parser.error(str(error))

    @classmethod
    def from_keywords(cls, **values: Any) -> "RouterConfig":
        """Keywords or YAML keys; aliases work, lists may be given as lists. Raises ConfigError."""
        named = by_name(cls, values)
        hints = typing.get_type_hints(cls)
        named = {name: _checked(name, value, hints[name]) for name, value in named.items()}
        config = cls(**named)
        config.check()
        return config

    @classmethod
    def parser(cls, prog: str | None = None) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(prog=prog, allow_abbrev=False)
        parser.add_argument("--config", help="YAML file with the same keys; flags override it")
        add_flags(parser, cls)
        refuse_flags(parser)
        return parser

    def check(self) -> None:
        """Everything that can be judged from the configuration and its files alone. Raises ConfigError."""
        for f in dataclasses.fields(self):
            value, least = getattr(self, f.name), f.metadata["least"]
            if least is not None and value is not None and value < least:
                raise ConfigError(f"{f.name}={value} is too small; {least:g} is the least")
        for name in ("port", "prometheus_port"):
            if (getattr(self, name) or 0) > 65535:
                raise ConfigError(f"{name}={getattr(self, name)} must be 65535 or less")
        if self.cache_threshold is not None and self.cache_threshold > 1:
            raise ConfigError(f"cache_threshold={self.cache_threshold} must lie in 0..1")
        for one, other in (("tls_cert_path", "tls_key_path"), ("client_cert_path", "client_key_path")):
            if bool(getattr(self, one)) != bool(getattr(self, other)):
                raise ConfigError(f"{one} and {other} must be given together")
        try:
            if self.ca_cert_paths or self.client_cert_path:
                workers_tls(self.ca_cert_paths, self.client_cert_path, self.client_key_path)
            if self.tls_cert_path and self.tls_key_path:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                load_chain(context, "tls", self.tls_cert_path, self.tls_key_path)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if 0 <= self.max_concurrent_requests < self.workers_processes:
            raise ConfigError(
                f"max_concurrent_requests={self.max_concurrent_requests} is too small for "
                f"workers_processes={self.workers_processes}; each process needs 1"
            )
        if not self.health_check_endpoint.startswith("/"):
            raise ConfigError(f"health_check_endpoint={self.health_check_endpoint!r} must start with /")
        urls: set[str] = set()
        for url in self.worker_urls:
            try:
                Address.parse(url)
            except ValueError as error:
                raise ConfigError(f"worker_urls: {error}") from error
            if url.rstrip("/") in urls:
                raise ConfigError(f"worker_urls={url!r} is given twice; each worker may be listed once")
            urls.add(url.rstrip("/"))
        if self.worker_api_key is not None and not re.search(KEY_PATTERN, self.worker_api_key):
            raise ConfigError("worker_api_key must be visible ASCII characters: it is sent in a header")
        if self.service_discovery and not self.selector:
            raise ConfigError("selector is missing; --service-discovery needs labels such as app=llm-worker")
        for item in self.selector:
            if not all(item.partition("=")):
                raise ConfigError(f"selector={item!r} must be key=value")
        for item in self.api_keys:
            if not all(item.partition(":")):
                raise ConfigError("api_keys: each must be name:token")
        for item in self.control_plane_api_keys:
            parts = item.split(":", 3)
            if len(parts) < 4 or not all(parts) or parts[2] not in ("admin", "user"):
                raise ConfigError("control_plane_api_keys: each must be id:name:role:key, role admin or user")

    @property
    def effective_policy(self) -> str:
        """The policy that runs: SGLang's threshold rule when one of its numbers was given explicitly."""
        tuned = (self.cache_threshold, self.balance_abs_threshold, self.balance_rel_threshold)
        if self.policy == "cache_aware" and any(v is not None for v in tuned):
            return "cache_aware_threshold"
        return self.policy


def add_flags(parser: argparse.ArgumentParser, cls: type, prefix: str = "") -> None:
    """One flag a key and alias of a configuration dataclass; absent flags parse to None.

    With a prefix ("router-"), flags are `--router-policy` and destinations `router_policy`.
    """
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        options = [f"--{prefix}{n.replace('_', '-')}" for n in (f.name, *f.metadata["aliases"])]
        kind, choices, many = _scalar(hints[f.name])
        text = f.metadata["help"].replace("%", "%%")
        if f.default not in (None, "", False, dataclasses.MISSING):
            text += f" (default {f.default})"
        common: dict[str, Any] = {
            "dest": prefix.replace("-", "_") + f.name,
            "default": None,
            "help": text,
        }
        if kind is bool:
            parser.add_argument(*options, action=argparse.BooleanOptionalAction, **common)
        else:
            parser.add_argument(*options, type=kind, choices=choices, nargs="*" if many else None, **common)


class _Refuse(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None) -> None:
        name = (option_string or "").removeprefix("--").removeprefix("router-")
        parser.error(f"{option_string} is not supported: {REFUSED[name]}")


def refuse_flags(parser: argparse.ArgumentParser, prefix: str = "") -> None:
    """Flags of the Rust gateway that a user may bring along, refused with the way to go."""
    for name in REFUSED:
        parser.add_argument(f"--{prefix}{name}", nargs="*", action=_Refuse, help=argparse.SUPPRESS)


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


def by_name(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """Aliases and dashes resolved. Raises ConfigError for unknown or doubly given keys."""
    names = {alias: f.name for f in dataclasses.fields(cls) for alias in (f.name, *f.metadata["aliases"])}
    out: dict[str, Any] = {}
    for given, value in values.items():
        name = names.get(str(given).replace("-", "_"))
        if name is None and str(given).replace("_", "-") in REFUSED:
            raise ConfigError(f"{given} is not supported: {REFUSED[str(given).replace('_', '-')]}")
        if name is None:
            raise ConfigError(
                f"unknown key {given!r}; known keys: {', '.join(f.name for f in dataclasses.fields(cls))}"
            )
        if name in out:
            raise ConfigError(f"{name} is given twice (once as {given!r})")
        out[name] = value
    return out


def _scalar(hint: Any) -> tuple[type, list[Any] | None, bool]:
    """(type, choices, many) of an annotation: scalar, Literal, tuple of scalars, or one with None."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    if typing.get_origin(hint) is Literal:
        return str, list(typing.get_args(hint)), False
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], None, True
    return hint, None, False


def _checked(name: str, value: Any, hint: Any) -> Any:
    """The value, lists as tuples. Raises ConfigError for a wrong type or choice."""
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
