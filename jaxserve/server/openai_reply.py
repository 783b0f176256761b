"""Answers and stream chunks of the OpenAI routes, from Sequences."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jaxserve.server.chat_parts import ChatParts
from jaxserve.server.schema import Resume
from jaxserve.server.sequence import Entry, Sequence
from jaxserve.text.tokenizer import Tokenizer


@dataclass
class Answer:
    """What the chunks of one answer have in common, and what of each sequence has been sent."""

    kind: str  # "chat.completion" or "text_completion"
    id: str
    model: str
    sequences: list[Sequence]
    n: int
    usage_at_end: bool = False
    usage_always: bool = False  # in every chunk, of its own choice
    token_ids: bool = False
    meta_info: Callable[[Sequence], dict[str, Any]] | None = None
    new_parts: Callable[[str, int], ChatParts] | None = None  # of a sequence: the answer's id, its own index
    created: int = field(default_factory=lambda: int(time.time()))
    sent: dict[int, "Sent"] = field(default_factory=dict)  # by sequence index

    def resume(self, resume: Resume) -> None:
        """Go on with a stream that another worker began."""
        if resume.created is not None:
            self.created = resume.created
        if resume.id is not None or resume.token_ids:
            sent = self.sent[0] = self.new_sent(0, len(resume.token_ids))
            if sent.parts is not None:
                sent.parts.feed(self.sequences[0].resumed_text)

    def parts(self, index: int) -> ChatParts | None:
        return None if self.new_parts is None else self.new_parts(self.id, index)

    def new_sent(self, index: int, tokens: int = 0) -> "Sent":
        return Sent(tokens, parts=self.parts(index))

    def whole(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "usage": self.usage(),
        }

    def chunk(self, choice: dict[str, Any] | None) -> dict[str, Any]:
        """One chunk of a stream; without a choice it is the one with the usage."""
        chunk: dict[str, Any] = {
            "id": self.id,
            "object": "chat.completion.chunk" if self.kind == "chat.completion" else self.kind,
            "created": self.created,
            "model": self.model,
            "choices": [choice] if choice else [],
        }
        if choice and self.usage_always:
            one = [self.sequences[choice["index"]]]
            chunk["usage"] = _usage(one, one)
        elif self.usage_at_end:
            chunk["usage"] = None if choice else self.usage()
        return chunk

    def usage(self) -> dict[str, Any]:
        """A prompt counts once, whatever n is."""
        return _usage([s for s in self.sequences if s.index % self.n == 0], self.sequences)

    def extras(self, sequence: Sequence, start: int) -> dict[str, Any]:
        """The choice's fields that were asked for; token ids from `start` on."""
        out: dict[str, Any] = {}
        if self.token_ids:
            out["token_ids"] = sequence.token_ids[start:]
        if self.meta_info is not None and sequence.finish is not None:
            out["meta_info"] = self.meta_info(sequence)
        return out


def _usage(prompts: list[Sequence], sequences: list[Sequence]) -> dict[str, Any]:
    """`prompts`: one sequence of each."""
    prompt = sum(len(s.request.input_ids) for s in prompts)
    completion = sum(len(s.token_ids) for s in sequences)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(s.cached_tokens for s in prompts)},
    }


@dataclass
class Sent:
    """How much of a sequence its stream has carried."""

    tokens: int = 0
    offset: int = 0  # characters of all tokens reported in logprobs
    parts: ChatParts | None = None

    def delta(self, text: str, is_last: bool) -> dict[str, Any]:
        """What a chat's chunk says of new text: nothing, while all of it is held back."""
        if self.parts is not None:
            return self.parts.feed(text, is_last)
        return {"content": text} if text else {}


def finish_fields(sequence: Sequence, parts: ChatParts | None = None) -> dict[str, Any]:
    finish = sequence.finish or {}
    reason = finish.get("type")
    if reason == "stop" and parts is not None and parts.num_calls:
        reason = "tool_calls"
    return {"finish_reason": reason, "matched_stop": finish.get("matched")}


# ---- chat ----


def chat_choice(answer: Answer, sequence: Sequence, tokenizer: Tokenizer | None) -> dict[str, Any]:
    parts = answer.parts(sequence.index)
    fields = {"content": sequence.text} if parts is None else parts.message(sequence.text)
    return {
        "index": sequence.index,
        "message": {"role": "assistant", "refusal": None, **fields},
        "logprobs": chat_logprobs(sequence, tokenizer, 0),
        **finish_fields(sequence, parts),
        **answer.extras(sequence, 0),
    }


def chat_chunks(answer: Answer, sequence: Sequence, tokenizer: Tokenizer | None) -> list[dict[str, Any]]:
    """The chunks due for a sequence that has moved on: role, parts, finish.

    They bring the ids and logprobs of all new tokens, also of those whose text is held back. Of a tracked
    sequence the last text and the finish are one chunk: who has all tokens has the finish.
    """
    chunks: list[dict[str, Any]] = []
    sent = answer.sent.get(sequence.index)
    is_first, is_last = sent is None, sequence.finish is not None
    if sent is None:
        sent = answer.sent[sequence.index] = answer.new_sent(sequence.index)
    delta = sent.delta(sequence.take_text(), is_last)
    if is_first:
        role = {"role": "assistant", "content": ""}
        if not delta and not is_last:
            return [_delta(answer, sequence, role, **_new_tokens(answer, sequence, sent, tokenizer))]
        chunks.append(_delta(answer, sequence, role))
    if is_last and sequence.tracked:
        extras = {**finish_fields(sequence, sent.parts), **answer.extras(sequence, sent.tokens)}
        return [*chunks, _delta(answer, sequence, delta, **extras)]
    if delta or (is_last and sent.tokens < len(sequence.output_logprobs)):
        tokens = _new_tokens(answer, sequence, sent, tokenizer)
        chunks.append(_delta(answer, sequence, delta or {"content": ""}, **tokens))
    if is_last:
        extras = {**finish_fields(sequence, sent.parts), **answer.extras(sequence, sent.tokens)}
        chunks.append(_delta(answer, sequence, {}, **extras))
    return chunks


def nothing_new(answer: Answer, sequence: Sequence, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """A chunk that says that the stream lives: proxies end those on which nothing comes."""
    tokens = _new_tokens(answer, sequence, answer.sent[sequence.index], tokenizer)
    return _delta(answer, sequence, {}, **tokens)


def _new_tokens(
    answer: Answer, sequence: Sequence, sent: Sent, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """The fields of a choice that are about tokens, of those that its stream has not carried: now it has."""
    fields: dict[str, Any] = {"logprobs": chat_logprobs(sequence, tokenizer, sent.tokens)}
    if answer.token_ids:
        fields["token_ids"] = sequence.token_ids[sent.tokens :]
    sent.tokens = len(sequence.token_ids)
    return fields


def _delta(answer: Answer, sequence: Sequence, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
    choice = {
        "index": sequence.index,
        "delta": delta,
        "logprobs": None,
        "finish_reason": None,
        "matched_stop": None,
    }
    return answer.chunk(choice | more)


def chat_logprobs(sequence: Sequence, tokenizer: Tokenizer | None, start: int) -> dict[str, Any] | None:
    """The logprobs of the output tokens from `start` on; None when none were asked for."""
    if not sequence.request.return_logprob:
        return None
    content = []
    for i, entry in enumerate(sequence.output_logprobs[start:], start):
        top = sequence.output_top[i] if sequence.output_top else []
        content.append({**_token(entry, tokenizer), "top_logprobs": [_token(t, tokenizer) for t in top]})
    return {"content": content, "refusal": None}


def _token(entry: Entry, tokenizer: Tokenizer | None) -> dict[str, Any]:
    logprob, token, text = entry
    return {
        "token": text or "",
        "bytes": list(tokenizer.token_bytes(token)) if tokenizer else None,
        "logprob": logprob,
    }


# ---- completions ----


def completion_choice(answer: Answer, sequence: Sequence, echo: str | None) -> dict[str, Any]:
    """`echo`: the prompt's text, or None when it is not wanted."""
    sent = Sent()
    return {
        "index": sequence.index,
        "text": (echo or "") + sequence.text,
        "logprobs": completion_logprobs(sequence, sent, echo),
        **finish_fields(sequence),
        **answer.extras(sequence, 0),
    }


def completion_chunks(answer: Answer, sequence: Sequence, echo: str | None) -> list[dict[str, Any]]:
    sent = answer.sent.get(sequence.index)
    first = sent is None
    if sent is None:
        sent = answer.sent[sequence.index] = Sent()
    text = (echo or "" if first else "") + sequence.take_text()
    if not text and sequence.finish is None:
        return []
    choice = {
        "index": sequence.index,
        "text": text,
        "logprobs": completion_logprobs(sequence, sent, echo if first else None),
        **finish_fields(sequence),
        **answer.extras(sequence, sent.tokens),
    }
    sent.tokens = len(sequence.token_ids)
    return [answer.chunk(choice)]


def completion_logprobs(sequence: Sequence, sent: Sent, echo: str | None) -> dict[str, Any] | None:
    """The tokens after `sent` (and the prompt's with `echo`) in parallel lists; moves `sent.offset`."""
    if not sequence.request.return_logprob:
        return None
    entries = _zip(sequence.output_logprobs[sent.tokens :], sequence.output_top[sent.tokens :])
    if echo is not None:
        entries = [*_zip(sequence.input_logprobs, sequence.input_top), *entries]
    offsets = []
    for entry, _ in entries:
        offsets.append(sent.offset)
        sent.offset += len(entry[2] or "")
    return {
        "tokens": [e[2] or "" for e, _ in entries],
        "token_logprobs": [e[0] for e, _ in entries],
        "top_logprobs": [{t[2] or "": t[0] for t in top} if top else None for _, top in entries],
        "text_offset": offsets,
    }


def _zip(entries: list[Entry], tops: list[Any]) -> list[tuple[Entry, Any]]:
    return [(entry, tops[i] if tops else None) for i, entry in enumerate(entries)]
