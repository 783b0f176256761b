"""A chat answer's parts: what the model thought, what it says, which tools it calls."""

import hashlib
from typing import Any

from jaxserve.text.reasoning import Thoughts
from jaxserve.text.tool_calls import ToolCall, ToolCalls


class ChatParts:
    """Takes the text of one answer in pieces and gives out fields of its message, once they are certain.

    Args:
        answer_id, index: of the answer and of this sequence in it. Calls' ids follow from them, so that
            another worker that goes on with the stream gives the same.
        thoughts, calls: None where they stay in the text.
    """

    def __init__(self, answer_id: str, index: int, thoughts: Thoughts | None, calls: ToolCalls | None):
        self._answer_id, self._index = answer_id, index
        self._thoughts, self._calls = thoughts, calls
        self.num_calls = 0

    def feed(self, text: str, is_last: bool = False) -> dict[str, Any]:
        """reasoning_content, content and tool_calls, as far as there is more of each."""
        fields: dict[str, Any] = {}
        if self._thoughts is not None:
            fields["reasoning_content"], text = self._thoughts.feed(text, is_last)
        if self._calls is not None:
            text, calls = self._calls.feed(text, is_last)
            fields["tool_calls"] = [self._call(call) for call in calls]
        fields["content"] = text
        return {name: part for name, part in fields.items() if part}

    def message(self, text: str) -> dict[str, Any]:
        """The fields of a whole message. Nothing that a model may do is left out."""
        fields = self.feed(text, is_last=True)
        if self._thoughts is not None:
            fields.setdefault("reasoning_content", None)
        if self._calls is not None:
            fields.setdefault("tool_calls", None)
        return {"content": None if self.num_calls else ""} | fields

    def _call(self, call: ToolCall) -> dict[str, Any]:
        number, self.num_calls = self.num_calls, self.num_calls + 1
        place = f"{self._answer_id} {self._index} {number}".encode()
        return {
            "index": number,
            "id": call.id or f"call_{hashlib.blake2b(place, digest_size=12).hexdigest()}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
