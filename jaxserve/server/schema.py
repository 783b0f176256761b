"""Bodies of the native routes, and the validation that every body goes through.

`parse` turns a decoded JSON object into a struct and refuses, by name, what it does not know, what is
not supported yet, and values of the wrong type. A null is the same as an absent field. Ranges that need
no knowledge of the engine are checked here; lengths and token ids in `sampling`.
"""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, ClassVar

import msgspec

from jaxserve.server.errors import RequestError

MAX_BATCH = 4096  # sequences of one request: prompts times n
MAX_N = 128
MAX_STOPS = 64
MAX_STOP_CHARS = 1024
MAX_TOP_LOGPROBS = 20
MAX_TOKEN_IDS_LOGPROB = 32
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 300
MAX_RID_CHARS = 256
MAX_SALT_CHARS = 1024
INF = float("inf")


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


class Body(msgspec.Struct, kw_only=True):
    """What `parse` fills. Fields of later work are refused unless their value switches nothing on."""

    unsupported: ClassVar[frozenset[str]] = frozenset()
    no_effect: ClassVar[frozenset[str]] = frozenset()  # known names that ask for nothing this engine does


class SamplingParams(Body):
    """SGLang's sampling_params, with its defaults."""

    max_new_tokens: int | msgspec.UnsetType | None = msgspec.UNSET  # unset: 128; null: up to the context
    min_new_tokens: int = 0
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    n: int = 1
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True  # fast tokenizers never add such spaces
    no_stop_trim: bool = False
    stream_interval: int | None = None
    logit_bias: dict[int, float] | None = None
    sampling_seed: int | None = None
    json_schema: str | dict[str, Any] | None = None  # a JSON text, or what it decodes to
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | dict[str, Any] | None = None

    unsupported = frozenset({"stop_regex", "custom_params"})


class GenerateBody(Body):
    """The body of /generate."""

    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None
    sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None
    rid: str | list[str] | None = None
    return_logprob: bool | list[bool] = False
    logprob_start_len: int | list[int] = -1
    top_logprobs_num: int | list[int] = 0
    token_ids_logprob: list[int | list[int]] | None = None
    return_text_in_logprobs: bool = False
    return_prompt_token_ids: bool = False
    stream: bool = False
    log_metrics: bool = True
    priority: int = 0
    extra_key: str | None = None
    cache_salt: str | None = None
    routed_dp_rank: int | None = None
    data_parallel_rank: int | None = None
    resume: dict[str, Any] | None = None  # a Resume

    unsupported = words("""
        session_id session_params input_embeds image_data video_data audio_data modalities lora_path lora_id
        return_hidden_states return_routed_experts routed_experts_start_len return_sampling_mask
        return_entropy custom_logit_processor bootstrap_host bootstrap_port bootstrap_room
        disagg_prefill_dp_rank require_reasoning max_thinking_tokens
    """)
    no_effect = words("no_logs routing_key conversation_id custom_labels external_trace_header")


class Resume(Body):
    """How far another worker had come with a stream that this one is to go on with (PROTOCOL.md, 4)."""

    token_ids: list[int]  # generated, and their text sent
    id: str | None = None  # of the answer; null: no event was sent
    created: int | None = None


class AbortBody(Body):
    rid: str | None = None
    abort_all: bool = False
    no_effect = frozenset({"abort_message", "finished_reason"})


class TokenizeBody(Body):
    prompt: str | list[str]
    model: str | None = None
    add_special_tokens: bool = True


class DetokenizeBody(Body):
    tokens: list[int | list[int]]
    model: str | None = None
    skip_special_tokens: bool = True


# Parameter -> (low, high, low is excluded). Both routes' names of a parameter are here.
RANGES: dict[str, tuple[float, float, bool]] = {
    "max_new_tokens": (0, INF, False),
    "min_new_tokens": (0, INF, False),
    "temperature": (0.0, INF, False),
    "top_p": (0.0, 1.0, True),
    "min_p": (0.0, 1.0, False),
    "frequency_penalty": (-2.0, 2.0, False),
    "presence_penalty": (-2.0, 2.0, False),
    "repetition_penalty": (0.0, 2.0, True),
    "n": (1, MAX_N, False),
    "stream_interval": (1, INF, False),
    "sampling_seed": (-(2**63), 2**63 - 1, False),
    "top_logprobs_num": (0, MAX_TOP_LOGPROBS, False),
    "logprob_start_len": (-1, INF, False),
    "priority": (-(2**31), 2**31 - 1, False),
}


def parse[B: Body](kind: type[B], values: Any, where: str = "") -> B:
    """A decoded JSON value as a `kind`. `where` prefixes parameter names ("sampling_params.").

    Raises RequestError.
    """
    if not isinstance(values, dict):
        raise RequestError(f"{where or 'the body'} must be a JSON object, got {show(values)}")
    known = kind.__struct_fields__
    kept = {}
    for name, value in values.items():
        if name in known:
            if value is not None or name == "max_new_tokens":
                kept[name] = value
        elif name in kind.unsupported:
            if value not in (None, False, "", [], {}, 0):
                raise RequestError(
                    f"{where}{name} is not supported", param=f"{where}{name}", code="unsupported_parameter"
                )
        elif name not in kind.no_effect:
            raise _unknown(kind, str(name), where)
    try:
        return msgspec.convert(kept, kind, str_keys=True)
    except msgspec.ValidationError as error:
        raise _type_error(str(error), kept, where) from None


def check_members(given: Iterable[str], known: Collection[str], where: str) -> None:
    """Raises RequestError for a name that an object of a body, `where`, does not know."""
    for name in given:
        if name not in known:
            raise RequestError(
                f"{where}.{name[:60]} is not a known parameter", param=where, code="unknown_parameter"
            )


def check_range(param: str, value: float, of: str | None = None) -> None:
    """Raises RequestError when `value` is outside RANGES[of or the last part of param]."""
    low, high, low_open = RANGES[of or param.rpartition(".")[2]]
    inside = low < value <= high if low_open else low <= value <= high
    if not inside or value == INF:
        raise out_of_range(param, value, low, high, low_open)


def out_of_range(
    param: str, value: Any, low: float, high: float, low_open: bool = False, why: str = ""
) -> RequestError:
    interval = f"{'(' if low_open else '['}{low}, {'infinity)' if high == INF else f'{high}]'}"
    return RequestError(f"{param} must be in {interval}{why}, got {show(value)}", param=param)


def show(value: Any) -> str:
    """A JSON value for an error message, never long."""
    if isinstance(value, (dict, list, tuple)):
        kind = "an object" if isinstance(value, dict) else "a list"
        return f"{kind} of {len(value)} item{'s' if len(value) != 1 else ''}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _unknown(kind: type[Body], name: str, where: str) -> RequestError:
    close = difflib.get_close_matches(name[:100], kind.__struct_fields__, n=1)
    hint = f"; did you mean {where}{close[0]}?" if close else ""
    shown = name if len(name) <= 60 else f"{name[:57]}..."
    return RequestError(
        f"{where}{shown} is not a known parameter{hint}", param=f"{where}{shown}", code="unknown_parameter"
    )


_STEP = re.compile(r"\.(\w+)|\[(\d+)\]|\[\.\.\.\]")


def _type_error(message: str, values: dict[str, Any], where: str) -> RequestError:
    """msgspec's "Expected `int`, got `str` - at `$.stop[2]`", with the parameter's name and its value."""
    what, _, path = message.partition(" - at `")
    of, _, path = path.rstrip("`").rpartition("` in `")  # "key` in `$.logit_bias"
    value: Any = None if of else values  # which of the keys is not said
    for name, index in _STEP.findall(path):
        try:
            value = value[int(index)] if index else value[name] if name else None
        except (KeyError, IndexError, TypeError):
            value = None
    param = where + path.removeprefix("$").removeprefix(".")
    if missing := re.search(r"missing required field `(\w+)`", what):
        return RequestError(f"{where}{missing[1]} is required", param=f"{where}{missing[1]}")
    expected = re.match(r"Expected `([^`]*)`", what)
    if not expected:  # a constraint of msgspec's own, such as an integer beyond 64 bits
        return RequestError(f"{param}: {what}", param=param)
    wanted = expected[1].replace("array", "list").replace(" | null", "").replace(" | ", " or ")
    label = f"{of} of {param}" if of else param
    shown = f", got {show(value)}" if value is not None else what[expected.end() :].replace("`", "")
    return RequestError(f"{label} must be of type {wanted}{shown}", param=param)


def per_item(value: Any, index: int, count: int, param: str) -> Any:
    """A field that is one value for all prompts or a list with one for each."""
    if not isinstance(value, list):
        return value
    if len(value) != count:
        raise RequestError(
            f"{param} has {len(value)} entries for {count} prompt{'s' if count != 1 else ''}", param=param
        )
    return value[index]


def either(values: Mapping[str, Any]) -> Any:
    """The value of two names for one thing. Raises RequestError when both are given and differ."""
    given = {name: v for name, v in values.items() if v is not None}
    if len(set(given.values())) > 1:
        names = " and ".join(f"{name}={show(v)}" for name, v in given.items())
        raise RequestError(f"{names} contradict each other; give one of them", param=next(iter(given)))
    return next(iter(given.values()), None)
