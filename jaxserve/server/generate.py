"""/generate without HTTP: a validated body in, SGLang's reply dictionaries out.

`reply` and `stream` are what both the HTTP route and `jaxserve.Engine` call:

    body = parse(GenerateBody, {"text": "Hi", "sampling_params": {"max_new_tokens": 4}})
    answer = await reply(service, body)               # a dict, or a list for a batch or n > 1
    async for event in stream(service, body): ...     # dicts with cumulative text; `index` in a batch
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

from jaxserve.messages import Generate, Info
from jaxserve.server.constraint import native_asks, resolve
from jaxserve.server.errors import RequestError
from jaxserve.server.sampling import (
    GrammarSpec,
    check_batch,
    check_entries,
    check_prompt,
    check_sampling,
    check_token_ids,
    native_name,
    resolve_sampling,
    resolve_text_rules,
    sequence_limit,
)
from jaxserve.server.schema import (
    MAX_BATCH,
    MAX_RID_CHARS,
    MAX_SALT_CHARS,
    MAX_TOKEN_IDS_LOGPROB,
    GenerateBody,
    Resume,
    SamplingParams,
    check_range,
    either,
    out_of_range,
    parse,
    per_item,
)
from jaxserve.server.sequence import Sequence
from jaxserve.server.service import Service, new_rid

THREAD_CHARS = 20_000  # longer texts (about 5 ms of tokenization) are worked on beside the event loop
PROMPT_CHARS = 20  # a prompt takes as long as so many characters more, however short
TOKEN_CHARS = 4  # a token takes as long to decode as so many characters to encode
WEIGHT_VERSION = "default"


async def reply(service: Service, body: GenerateBody) -> dict[str, Any] | list[dict[str, Any]]:
    """The whole answer. Raises RequestError, EngineDeadError. Cancelling aborts what runs."""
    sequences, batch = await prepare(service, body)
    await service.complete(sequences)
    replies = [as_reply(s, body) for s in sequences]
    return replies if batch else replies[0]


async def stream(service: Service, body: GenerateBody) -> AsyncGenerator[dict[str, Any]]:
    """One dict an event: the reply so far. Raises as `reply`; closing the iterator aborts what runs."""
    sequences, batch = await prepare(service, body)
    async with contextlib.aclosing(follow(service, body, sequences, batch)) as events:
        async for _, event in events:
            yield event


async def follow(
    service: Service, body: GenerateBody, sequences: list[Sequence], batch: bool
) -> AsyncGenerator[tuple[Sequence, dict[str, Any]]]:
    """The events of prepared sequences, each with the sequence it is about."""
    with service.admitted(sequences):
        async with contextlib.aclosing(service.follow(sequences)) as events:
            async for sequence in events:
                event = as_reply(sequence, body)
                if batch:
                    event["index"] = sequence.index
                yield sequence, event


async def prepare(service: Service, body: GenerateBody, tracked: bool = False) -> tuple[list[Sequence], bool]:
    """The sequences a body asks for, prompt by prompt and sample by sample, and whether they are a list.

    Raises RequestError; nothing is submitted yet.
    """
    arrived_s = service.clock()
    prompts, batch, param = await _prompts(service, body)
    params = _sampling_params(body, len(prompts))
    grammars = await resolve(service, native_asks(params, native_name))
    sequences = build_sequences(
        service,
        prompts,
        params,
        arrived_s=arrived_s,
        param=param,
        name=native_name,
        constraints=[GrammarSpec(grammar) for grammar in grammars],
        logprobs=[_logprob_fields(service, body, i, len(prompts), len(p)) for i, p in enumerate(prompts)],
        rid=body.rid,
        priority=body.priority,
        salt=make_salt(body.cache_salt, body.extra_key),
        dp_rank=check_dp_rank(service, body.routed_dp_rank, body.data_parallel_rank),
        logprob_text=body.return_text_in_logprobs,
        log_metrics=body.log_metrics,
        tracked=tracked and body.stream,
        resume=parse_resume(body.resume, body.stream),
    )
    return sequences, batch or params[0].n > 1


def build_sequences(
    service: Service,
    prompts: list[list[int]],
    params: list[SamplingParams],
    *,
    arrived_s: float,
    param: str,
    name: Callable[[str], str],
    constraints: list[GrammarSpec],
    logprobs: list[dict[str, Any]],
    rid: str | list[str] | None,
    priority: int,
    salt: str,
    dp_rank: int | None,
    logprob_text: bool,
    log_metrics: bool = True,
    tracked: bool = False,
    resume: Resume | None = None,
) -> list[Sequence]:
    """n sequences for each prompt, all checked. Raises RequestError.

    Args:
        params, constraints: one a prompt.
        arrived_s: when the body had come; an abort since then is theirs.
        param: the body's name for the prompts, and `name` for each sampling parameter, in messages.
        logprobs: the logprob fields of each prompt's Generate.
        tracked: asked for; only one sequence without logprobs can be.
    """
    info, count, n = service.client.info, len(prompts), params[0].n
    check_range("priority", priority)
    for each in {id(p): p for p in params}.values():
        check_sampling(each, info, name, service.tokenizer is not None)
    if any(p.n != n for p in params):
        raise RequestError(f"{name('n')} must be the same for all prompts", param=name("n"))
    if count * n > MAX_BATCH:
        raise RequestError(
            f"{count} prompts with n={n} are {count * n} sequences; one request may have {MAX_BATCH}",
            param=param,
        )
    alone = count * n == 1 and not any(logprobs)
    if resume is not None:
        if not alone:
            raise RequestError("resume takes one sequence, without logprobs", param="resume")
        check_token_ids(resume.token_ids, info, "resume.token_ids")
    rids = _rids(rid, count, n)
    sequences = []
    for i, input_ids in enumerate(prompts):
        check_prompt(input_ids, info, f"{param}[{i}]" if count > 1 else param)
        rules = resolve_text_rules(params[i], service.config.stream_interval)
        for sample in range(n):
            sampling = resolve_sampling(
                params[i], len(input_ids), sample, info, service.eos_token_ids, name, constraints[i]
            )
            request = Generate(
                rid=rids[i * n + sample],
                input_ids=input_ids,
                sampling=sampling,
                priority=priority,
                cache_salt=salt,
                dp_rank=dp_rank,
                output_ids=resume.token_ids if resume is not None else [],
                **logprobs[i],
            )
            sequences.append(
                Sequence(
                    request,
                    rules,
                    service.tokenizer,
                    arrived_s=arrived_s,
                    index=i * n + sample,
                    public_rid=rid[i] if isinstance(rid, list) else rid,
                    score_only=params[i].max_new_tokens == 0,
                    logprob_text=logprob_text,
                    log_metrics=log_metrics,
                    tracked=tracked and alone,
                    reply_id=resume.id if resume is not None else None,
                )
            )
    return sequences


def as_reply(sequence: Sequence, body: GenerateBody) -> dict[str, Any]:
    """The reply dictionary of a sequence as it is now."""
    meta = as_meta_info(sequence)
    if body.return_prompt_token_ids:
        meta["prompt_token_ids"] = sequence.request.input_ids
    out: dict[str, Any] = {"output_ids": list(sequence.token_ids), "meta_info": meta}
    return out if sequence.has_no_text else {"text": sequence.text, **out}


def as_meta_info(sequence: Sequence) -> dict[str, Any]:
    request, finish = sequence.request, sequence.finish
    meta: dict[str, Any] = {
        "id": sequence.reply_id,
        "finish_reason": finish,
        "prompt_tokens": len(request.input_ids),
        "completion_tokens": len(sequence.token_ids),
        "cached_tokens": sequence.cached_tokens,
        "reasoning_tokens": 0,
        "num_retractions": sequence.num_retractions,
        "weight_version": WEIGHT_VERSION,
        "dp_rank": sequence.dp_rank,
    }
    if steps := sequence.spec_steps:
        drafted, accepted = sequence.spec_drafted, sequence.spec_accepted
        meta["spec_verify_ct"] = steps
        meta["spec_accept_length"] = 1 + accepted / steps
        meta["spec_accept_rate"] = accepted / drafted if drafted else 0.0
        meta["spec_draft_token_num"] = drafted
        meta["spec_accept_token_num"] = accepted
    if request.return_logprob:
        meta["input_token_logprobs"] = list(sequence.input_logprobs)
        meta["output_token_logprobs"] = list(sequence.output_logprobs)
        if request.top_logprobs_num:
            meta["input_top_logprobs"] = list(sequence.input_top)
            meta["output_top_logprobs"] = list(sequence.output_top)
        if request.token_ids_logprob:
            meta["input_token_ids_logprobs"] = list(sequence.input_ids_logprobs)
            meta["output_token_ids_logprobs"] = list(sequence.output_ids_logprobs)
    if finish is not None:
        meta["e2e_latency"] = sequence.e2e_latency_s
        meta["response_sent_to_client_ts"] = time.time()
    return meta


# ---- parts of a body that other routes have too ----


async def encode(
    service: Service, texts: list[str], param: str, add_special_tokens: bool = True
) -> list[list[int]]:
    """Prompt texts as token ids. Raises RequestError without a tokenizer or for a hopelessly long text."""
    tokenizer = service.tokenizer
    if tokenizer is None:
        raise RequestError(
            f"{param} is text, but this server runs with --skip-tokenizer-init; send input_ids", param=param
        )
    limit = sequence_limit(service.client.info)
    longest = max(map(len, texts), default=0)
    if longest > limit * tokenizer.max_token_chars:  # not tokenized at all
        raise RequestError(
            f"{param} has {longest} characters, more than {limit} tokens can hold",
            param=param,
            code="context_length_exceeded",
        )
    try:
        if sum(map(len, texts)) + PROMPT_CHARS * len(texts) > THREAD_CHARS:
            return await asyncio.to_thread(tokenizer.encode_batch, texts, add_special_tokens)
        return [tokenizer.encode(text, add_special_tokens) for text in texts]
    except TypeError:  # JSON brings no such text, a caller in this process can
        raise RequestError(
            f"{param} holds half a surrogate pair, which is no character", param=param
        ) from None


async def decode(service: Service, lists: list[list[int]], skip_special_tokens: bool) -> list[str]:
    """The texts of lists of valid token ids, on a server with a tokenizer."""
    tokenizer = service.tokenizer
    assert tokenizer is not None
    if TOKEN_CHARS * sum(map(len, lists)) + PROMPT_CHARS * len(lists) > THREAD_CHARS:
        return await asyncio.to_thread(tokenizer.fast.decode_batch, lists, skip_special_tokens)
    return [tokenizer.decode(ids, skip_special_tokens) for ids in lists]


async def beside_loop[T](num_chars: int, work: Callable[..., T], *args: Any) -> T:
    """What `work` returns; it runs in a thread when so many characters would keep the others waiting."""
    return await asyncio.to_thread(work, *args) if num_chars > THREAD_CHARS else work(*args)


def token_lists(entries: list[Any], info: Info, param: str) -> tuple[list[list[int]], bool]:
    """(lists of token ids, whether it was not one list alone). Raises RequestError for too many and a mix."""
    check_entries(entries, info, param)
    batch = bool(entries) and isinstance(entries[0], list)
    if any(isinstance(entry, list) != batch for entry in entries):
        raise RequestError(
            f"{param} mixes token ids and lists; give one list of token ids, or a list of such lists",
            param=param,
        )
    return (entries if batch else [entries]), batch


def check_dp_rank(service: Service, routed_dp_rank: int | None, data_parallel_rank: int | None) -> int | None:
    rank = either({"routed_dp_rank": routed_dp_rank, "data_parallel_rank": data_parallel_rank})
    if rank is not None and not 0 <= rank < service.client.info.dp_size:
        name = "routed_dp_rank" if routed_dp_rank is not None else "data_parallel_rank"
        raise out_of_range(name, rank, 0, service.client.info.dp_size - 1)
    return rank


def parse_resume(given: dict[str, Any] | None, is_stream: bool) -> Resume | None:
    """Raises RequestError."""
    if given is None:
        return None
    if not is_stream:
        raise RequestError("resume needs stream=true", param="resume")
    return parse(Resume, given, "resume.")


def make_salt(cache_salt: str | None, extra_key: str | None) -> str:
    """One salt of SGLang's two: either alone is itself, both are joined by a NUL."""
    for name, value in (("cache_salt", cache_salt), ("extra_key", extra_key)):
        if value is not None and len(value) > MAX_SALT_CHARS:
            raise RequestError(
                f"{name} may have up to {MAX_SALT_CHARS} characters, got {len(value)}", param=name
            )
    return "\0".join(part for part in (cache_salt, extra_key) if part)


def check_rid(rid: str) -> str:
    if not 1 <= len(rid) <= MAX_RID_CHARS:
        raise RequestError(f"rid must have 1 to {MAX_RID_CHARS} characters, got {len(rid)}", param="rid")
    return rid


# ---- parts of this body ----


async def _prompts(service: Service, body: GenerateBody) -> tuple[list[list[int]], bool, str]:
    """(token ids of each prompt, whether the body is a batch, the parameter they came in)."""
    text, ids = body.text, body.input_ids
    if (text is None) == (ids is None):
        both = (
            "both text and input_ids are given" if text is not None else "neither text nor input_ids is given"
        )
        raise RequestError(f"{both}; give exactly one of them", param="text" if text is None else "input_ids")
    if ids is None:
        texts = [text] if isinstance(text, str) else list(text or ())
        check_batch(len(texts), "text")
        return await encode(service, texts, "text"), isinstance(text, list), "text"
    return *token_lists(ids, service.client.info, "input_ids"), "input_ids"


def _sampling_params(body: GenerateBody, count: int) -> list[SamplingParams]:
    """One a prompt."""
    given = body.sampling_params
    dicts = given if isinstance(given, list) else [given or {}]
    if isinstance(given, list) and len(given) != count:
        raise RequestError(
            f"sampling_params has {len(given)} entries for {count} prompts", param="sampling_params"
        )
    parsed = [parse(SamplingParams, d, "sampling_params.") for d in dicts]
    return parsed if isinstance(given, list) else parsed * count


def _rids(rid: str | list[str] | None, count: int, n: int) -> list[str]:
    """One engine rid a sequence: the client's, with a number where one name stands for several."""
    total = count * n
    if rid is None:
        return [new_rid() for _ in range(total)]
    if isinstance(rid, str):
        check_rid(rid)
        return [rid] if total == 1 else [f"{rid}_{i}" for i in range(total)]
    names = [check_rid(per_item(rid, i, count, "rid")) for i in range(count)]
    if len(set(names)) != count:
        raise RequestError("rid holds the same id twice", param="rid")
    return names if n == 1 else [f"{name}_{i}" for name in names for i in range(n)]


def _logprob_fields(
    service: Service, body: GenerateBody, i: int, count: int, prompt_len: int
) -> dict[str, Any]:
    """The logprob fields of prompt i's Generate."""
    wanted = per_item(body.return_logprob, i, count, "return_logprob")
    start = per_item(body.logprob_start_len, i, count, "logprob_start_len")
    top = per_item(body.top_logprobs_num, i, count, "top_logprobs_num")
    ids: Any = body.token_ids_logprob or []
    if any(isinstance(entry, list) for entry in ids):
        ids = per_item(ids, i, count, "token_ids_logprob")
    if not isinstance(ids, list) or any(isinstance(entry, list) for entry in ids):
        raise RequestError(
            "token_ids_logprob must be a list of token ids, or one such list a prompt",
            param="token_ids_logprob",
        )
    check_range("top_logprobs_num", top)
    if not -1 <= start <= prompt_len:
        raise out_of_range("logprob_start_len", start, -1, prompt_len, why=" (the prompt's length)")
    if len(ids) > MAX_TOKEN_IDS_LOGPROB:
        raise RequestError(
            f"token_ids_logprob may have up to {MAX_TOKEN_IDS_LOGPROB} ids, got {len(ids)}",
            param="token_ids_logprob",
        )
    check_token_ids(ids, service.client.info, "token_ids_logprob")
    if not wanted:
        return {}
    return {
        "return_logprob": True,
        "logprob_start_len": start if start < prompt_len else -1,
        "top_logprobs_num": top,
        "token_ids_logprob": tuple(ids),
    }
