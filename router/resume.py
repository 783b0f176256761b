"""Going on with a broken stream on another worker (PROTOCOL.md, section 4).

`Tracker` sits between worker and client of one stream that can be resumed: it learns the token ids from
the worker's comment lines, keeps those lines from the client, and lets only whole events through.
"""

from typing import Any

import msgspec

from router.call import BAD_JSON, Call

HEADER = b"x-resume: track\r\n"
_PATHS = ("/generate", "/v1/completions", "/v1/chat/completions")
_FORBIDDEN = (
    "tools", "functions", "logprobs", "top_logprobs", "prompt_logprobs", "return_logprob", "echo",
    "return_hidden_states", "image_data", "video_data", "audio_data", "return_routed_experts", "resume",
)  # fmt: skip
_MAX_HELD_BYTES = 1 << 20


class Tracker:
    """`feed` what the worker sends, pass on what it returns. `token_ids`: what the client has seen."""

    def __init__(self, body: dict[str, Any]) -> None:
        self.body = body
        self.token_ids: list[int] = []
        self.id: str | None = None
        self.created: int | None = None
        self.done = False  # the stream's end has been passed on
        self._held = b""  # an unfinished event
        self._first = True

    def feed(self, data: bytes) -> bytes:
        """The whole events in what has come, without token comments; the rest waits. May be empty."""
        data = self._held + data
        end = data.rfind(b"\n\n")
        if end < 0:
            self._held = data
            return b""
        self._held = data[end + 2 :]
        out = []
        for event in data[:end].split(b"\n\n"):
            if event.startswith(b": tokens"):
                line, _, event = event.partition(b"\n")
                self.token_ids += [int(i) for i in line[8:].split(b",") if i.strip().isdigit()]
                if not event:
                    continue
            if self._first and event.startswith(b"data:"):
                self._first = False
                self._remember(event)
            if event == b"data: [DONE]":
                self.done = True
            out.append(event)
        return b"\n\n".join(out) + b"\n\n" if out else b""

    def broke(self) -> None:
        """The worker is gone: what was held of an unfinished event is dropped."""
        self._held = b""

    @property
    def overfull(self) -> bool:
        """An event grows without end; it is no longer worth holding back."""
        return len(self._held) > _MAX_HELD_BYTES

    def request(self) -> bytes:
        """The body that asks another worker to go on."""
        resume: dict[str, Any] = {"token_ids": self.token_ids}
        if self.id is not None:
            resume["id"] = self.id
        if self.created is not None:
            resume["created"] = self.created
        return msgspec.json.encode({**self.body, "resume": resume})

    def _remember(self, event: bytes) -> None:
        try:
            value = msgspec.json.decode(event[5:])
        except BAD_JSON:
            return
        if isinstance(value, dict):
            meta = value.get("meta_info")  # of /generate
            name = meta.get("id") if isinstance(meta, dict) else value.get("id")
            self.id = name if isinstance(name, str) else None
            self.created = value["created"] if isinstance(value.get("created"), int) else None


def make_tracker(call: Call) -> Tracker | None:
    """A tracker when the request can be resumed: one greedy or seeded sequence, and nothing that needs
    more state than its tokens."""
    if not call.stream or call.path not in _PATHS:
        return None
    try:
        body = msgspec.json.decode(call.body)
    except BAD_JSON:
        return None
    if not isinstance(body, dict):
        return None
    sampling = body.get("sampling_params") if call.path == "/generate" else body
    if sampling is None:
        sampling = {}
    if not isinstance(sampling, dict):
        return None
    if any(body.get(name) or sampling.get(name) for name in _FORBIDDEN):
        return None
    if sampling.get("n") not in (None, 1) or sampling.get("best_of") not in (None, 1):
        return None
    prompt = body.get("text", body.get("prompt"))
    if isinstance(prompt, list) and not all(isinstance(i, int) for i in prompt):
        return None
    ids = body.get("input_ids")
    if isinstance(ids, list) and not all(isinstance(i, int) for i in ids):
        return None
    messages = body.get("messages") or []
    if not isinstance(messages, list):
        return None
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            return None
    seeded = sampling.get("seed") is not None or sampling.get("sampling_seed") is not None
    greedy = sampling.get("temperature") == 0 or sampling.get("top_k") == 1
    return Tracker(body) if seeded or greedy else None
