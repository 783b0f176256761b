"""A chat answer's parts: what the model thought, what it says, which tools it calls."""

import hashlib
from typing import Any, NamedTuple

from jaxserve.text import reasoning, tool_calls
from jaxserve.text.channels import Channels
from jaxserve.text.forced_calls import ForcedCalls
from jaxserve.text.reasoning import Thoughts
from jaxserve.text.tool_calls import ToolCall, ToolCalls, Tools

CHANNELS = "gpt-oss"  # of both parsers: the format that has no tags


class Parsers(NamedTuple):
    """How the answers to one request are to be taken apart.

    Args:
        reasoning, tool_calls: names of `--reasoning-parser` and `--tool-call-parser`; None: what it reads
            stays in the text.
        continued: the final message, which the answer goes on with.
        at_once: thoughts are given out in one piece.
        forced: calls are the list that the grammar forces, in no family's format.
        behind: the tag behind which that list begins, of thoughts that stay in the text.
    """

    reasoning: str | None
    tool_calls: str | None
    tools: Tools
    continued: str
    at_once: bool
    forced: bool = False
    behind: str = ""

    @property
    def are_none(self) -> bool:
        return self.reasoning is None and self.tool_calls is None and not self.forced

    @property
    def have_channels(self) -> bool:
        return CHANNELS in (self.reasoning, self.tool_calls)

    @property
    def read_special_tokens(self) -> bool:
        """The tags of some tokenizers are special tokens, which texts leave out."""
        return self.have_channels or self.tool_calls is not None or self.forced

    def parts(self, answer_id: str, index: int, prompt: str) -> "ChatParts":
        """Of one sequence; `prompt` is its prompt's end."""
        return ChatParts(self, answer_id, index, prompt)


class ChatParts:
    """Takes the text of one answer in pieces and gives out fields of its message, once they are certain.

    Args:
        answer_id, index: of the answer and of this sequence in it. Calls' ids follow from them, so that
            another worker that goes on with the stream gives the same.
    """

    def __init__(self, parsers: Parsers, answer_id: str, index: int, prompt: str):
        self._parsers, self._answer_id, self._index = parsers, answer_id, index
        self._channels = self._thoughts = None
        self._calls: ToolCalls | ForcedCalls | None = None
        self._short_ids = False
        self._ids: set[str] = set()
        call, style = None, tool_calls.STYLES.get(parsers.tool_calls or "")
        if style is not None:
            self._short_ids = style.short_ids
        forced = ForcedCalls(parsers.tools, parsers.behind) if parsers.forced else None
        if parsers.have_channels:
            self._channels = Channels(parsers.tools, parsers.at_once, forced, parsers.reasoning is None)
            return
        self._calls = forced
        if forced is None and style is not None:
            call = style.opening
            self._calls = ToolCalls(style, parsers.tools)
        if parsers.reasoning is not None:
            self._thoughts = Thoughts(
                reasoning.STYLES[parsers.reasoning],
                prompt,
                continued=parsers.continued,
                call=call,
                at_once=parsers.at_once,
            )

    @property
    def num_calls(self) -> int:
        return len(self._ids)

    def feed(self, text: str, is_last: bool = False) -> dict[str, Any]:
        """reasoning_content, content and tool_calls, as far as there is more of each."""
        thoughts = ""
        calls: list[ToolCall] = []
        if self._channels is not None:
            thoughts, text, calls = self._channels.feed(text, is_last)
        if self._thoughts is not None:
            thoughts, text = self._thoughts.feed(text, is_last)
        if self._calls is not None:
            text, more = self._calls.feed(text, is_last)
            calls += more
        fields = {
            "reasoning_content": thoughts,
            "content": text,
            "tool_calls": [self._call(call) for call in calls],
        }
        return {name: part for name, part in fields.items() if part}

    def message(self, text: str) -> dict[str, Any]:
        """The fields of a whole message."""
        fields = self.feed(text, is_last=True)
        if self._parsers.reasoning is not None:
            fields.setdefault("reasoning_content", None)
        return {"content": None if self.num_calls else ""} | fields

    def _call(self, call: ToolCall) -> dict[str, Any]:
        number, id = self.num_calls, call.id
        if id is None or id in self._ids:
            place = f"{self._answer_id} {self._index} {number}".encode()
            name = hashlib.blake2b(place, digest_size=12).hexdigest()
            id = name[:9] if self._short_ids else f"call_{name}"
        self._ids.add(id)
        return {
            "index": number,
            "id": id,
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
