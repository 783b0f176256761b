"""From a body's sampling parameters to the engine's Sampling and the text rules kept on this side.

All checks that need the engine's Info are here: prompt length, token ids, output length.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from jaxserve.messages import Info, Sampling
from jaxserve.server.errors import RequestError
from jaxserve.server.schema import (
    MAX_BATCH,
    MAX_LOGIT_BIAS,
    MAX_STOP_CHARS,
    MAX_STOP_TOKEN_IDS,
    MAX_STOPS,
    SamplingParams,
    check_range,
    out_of_range,
    show,
    words,
)

DEFAULT_MAX_NEW_TOKENS = 128
GREEDY_BELOW = 1e-6
# What the device's float32 takes for zero or infinity becomes a number of the same effect.
LEAST, MOST = 1e-30, 1e30
NUMBERS = words("""
    min_new_tokens temperature top_p min_p frequency_penalty presence_penalty repetition_penalty n
""")
OPENAI_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "sampling_seed": "seed"}


@dataclass(frozen=True)
class TextRules:
    """How the tokens of a sequence become text and events; the engine never sees it."""

    stops: tuple[str, ...] = ()
    keep_stop: bool = False  # leave the stop string or token in the text
    skip_special_tokens: bool = True
    stream_interval: int = 1  # tokens between two events


@dataclass(frozen=True)
class GrammarSpec:
    """The grammar of an output, from its first token on or behind the tokens `after`. Empty: none.

    `opening`: `after` counts only where the output begins with this token.
    """

    grammar: str = ""
    after: tuple[int, ...] = ()
    opening: int | None = None


def native_name(name: str) -> str:
    """A sampling parameter's name in the body of /generate."""
    return f"sampling_params.{name}"


def openai_name(name: str) -> str:
    return OPENAI_NAMES.get(name, name)


def check_sampling(
    params: SamplingParams, info: Info, name: Callable[[str], str], has_tokenizer: bool
) -> None:
    """Everything that does not depend on the prompt. Raises RequestError."""
    for number in NUMBERS:
        check_range(name(number), getattr(params, number), of=number)
    for optional in ("stream_interval", "sampling_seed", "max_new_tokens"):
        value = getattr(params, optional)
        if value is not None and value is not msgspec.UNSET:
            check_range(name(optional), value, of=optional)
    if params.top_k != -1 and params.top_k < 1:
        raise RequestError(
            f"{name('top_k')} must be -1 (the whole vocabulary) or at least 1, got {show(params.top_k)}",
            param=name("top_k"),
        )
    stops = stop_strings(params)
    if stops and not has_tokenizer:
        raise RequestError(
            f"{name('stop')} needs a tokenizer; this server runs with --skip-tokenizer-init",
            param=name("stop"),
        )
    if len(stops) > MAX_STOPS:
        raise RequestError(
            f"{name('stop')} may have up to {MAX_STOPS} strings, got {len(stops)}", param=name("stop")
        )
    if any(not s or len(s) > MAX_STOP_CHARS for s in stops):
        raise RequestError(
            f"{name('stop')} strings must have 1 to {MAX_STOP_CHARS} characters", param=name("stop")
        )
    _check_count("stop_token_ids", params.stop_token_ids, MAX_STOP_TOKEN_IDS, name)
    _check_count("logit_bias", params.logit_bias, MAX_LOGIT_BIAS, name)
    check_token_ids(params.stop_token_ids or (), info, name("stop_token_ids"))
    bias = params.logit_bias or {}
    check_token_ids(bias, info, name("logit_bias"))
    for token, value in bias.items():
        if not -100 <= value <= 100:
            raise out_of_range(f"{name('logit_bias')}[{token}]", value, -100, 100)


def _check_count(what: str, entries: Collection[Any] | None, most: int, name: Callable[[str], str]) -> None:
    if entries and len(entries) > most:
        raise RequestError(
            f"{name(what)} may have up to {most} entries, got {len(entries)}", param=name(what)
        )


def resolve_sampling(
    params: SamplingParams,
    prompt_len: int,
    sample: int,
    info: Info,
    eos_token_ids: frozenset[int],
    name: Callable[[str], str],
    constraint: GrammarSpec,
) -> Sampling:
    """The engine's Sampling for sample number `sample` of a prompt. Raises RequestError."""
    room = sequence_limit(info) - prompt_len
    wanted = params.max_new_tokens
    if wanted is None:
        max_new_tokens = room
    elif isinstance(wanted, msgspec.UnsetType):
        max_new_tokens = min(DEFAULT_MAX_NEW_TOKENS, room)
    elif wanted > room:
        raise RequestError(
            f"{name('max_new_tokens')}={show(wanted)} and a prompt of {prompt_len} tokens exceed "
            f"the limit of {sequence_limit(info)} tokens for prompt and output; ask for {room} or fewer",
            param=name("max_new_tokens"),
            code="context_length_exceeded",
        )
    else:
        max_new_tokens = wanted
    if params.min_new_tokens > max_new_tokens:
        raise RequestError(
            f"{name('min_new_tokens')} must be in [0, {max_new_tokens}] ({name('max_new_tokens')}), "
            f"got {show(params.min_new_tokens)}",
            param=name("min_new_tokens"),
        )
    stop_ids = set(params.stop_token_ids or ())
    if not params.ignore_eos or constraint.grammar:  # which says where the output may end
        stop_ids |= eos_token_ids
    greedy = params.temperature < GREEDY_BELOW
    return Sampling(
        max_new_tokens=max(1, max_new_tokens),  # 0: the engine makes one, which is not given out
        min_new_tokens=params.min_new_tokens,
        temperature=0.0 if greedy else min(params.temperature, MOST),
        top_p=max(params.top_p, LEAST),
        top_k=params.top_k if params.top_k < info.vocab_size else -1,
        min_p=params.min_p,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        repetition_penalty=max(params.repetition_penalty, LEAST),
        stop_token_ids=tuple(sorted(stop_ids)),
        logit_bias=params.logit_bias or {},
        seed=None if params.sampling_seed is None else _fold(params.sampling_seed + sample),
        grammar=constraint.grammar,
        grammar_opening=constraint.opening,
        grammar_after=constraint.after,
    )


def resolve_text_rules(params: SamplingParams, stream_interval: int) -> TextRules:
    """`stream_interval`: the server's, unless the request brings its own."""
    return TextRules(
        stops=tuple(stop_strings(params)),
        keep_stop=params.no_stop_trim,
        skip_special_tokens=params.skip_special_tokens,
        stream_interval=params.stream_interval or stream_interval,
    )


def check_prompt(token_ids: Sequence[int], info: Info, param: str) -> None:
    """Raises RequestError for an empty prompt, one that leaves no room for output, or a foreign id."""
    limit = sequence_limit(info)
    if not token_ids:
        raise RequestError(f"{param} is empty; a prompt has at least one token", param=param)
    if len(token_ids) >= limit:
        raise RequestError(
            f"{param} has {len(token_ids)} tokens; at most {limit - 1} fit beside one output token "
            f"(context_len={info.context_len}, max_req_len={info.max_req_len})",
            param=param,
            code="context_length_exceeded",
        )
    check_token_ids(token_ids, info, param)


def check_entries(entries: Sequence[Any], info: Info, param: str) -> None:
    """Raises RequestError for more token ids than a sequence has, or more prompts than a request may have.

    To be asked before each entry is looked at: a body has room for millions.
    """
    limit = sequence_limit(info)
    if entries and not isinstance(entries[0], int):
        check_batch(len(entries), param)
    elif len(entries) > limit:
        raise RequestError(
            f"{param} has {len(entries)} tokens; a sequence has at most {limit} "
            f"(context_len={info.context_len}, max_req_len={info.max_req_len})",
            param=param,
            code="context_length_exceeded",
        )


def check_batch(count: int, param: str) -> None:
    if not 1 <= count <= MAX_BATCH:
        raise RequestError(f"{param} must hold 1 to {MAX_BATCH} prompts, got {count}", param=param)


def check_token_ids(token_ids: Collection[int], info: Info, param: str) -> None:
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < info.vocab_size):
        wrong = next(t for t in token_ids if not 0 <= t < info.vocab_size)
        raise RequestError(
            f"{param} holds token id {show(wrong)}; valid ids are [0, {info.vocab_size - 1}]", param=param
        )


def sequence_limit(info: Info) -> int:
    """Prompt and output together, in tokens."""
    return min(info.context_len, info.max_req_len)


def stop_strings(params: SamplingParams) -> list[str]:
    stop = params.stop
    return [stop] if isinstance(stop, str) else list(stop or ())


def _fold(seed: int) -> int:
    """Any 64-bit seed in 31 bits, the range every device integer holds; small seeds stay themselves."""
    return (seed ^ (seed >> 31)) & 0x7FFFFFFF if seed >= 0 else (~seed ^ 0x5BD1E995) & 0x7FFFFFFF
