"""Answers in channels, as GPT-OSS gives them: thoughts, calls and what is said, each in a message of its own.

    <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...

Source: OpenAI 2025, "OpenAI harmony response format".
"""

import re

from jaxserve.text.forced_calls import ForcedCalls
from jaxserve.text.tags import Holder
from jaxserve.text.tool_calls import ToolCall, Tools, read_arguments

MESSAGE = "<|message|>"
BEGINS = ("<|start|>", "<|channel|>")
ENDS = ("<|end|>", "<|return|>", "<|call|>")
TAG = re.compile("|".join(map(re.escape, (*BEGINS, *ENDS))))
LONGEST = max(map(len, (*BEGINS, *ENDS)))
RECIPIENT = re.compile(r"\bto=functions\.([^\s<]+)")
THOUGHTS = "analysis"
FINAL = "final"  # what is said to the user
BEFORE_FINAL = f"<|channel|>{FINAL}{MESSAGE}"


class Channels(Holder):
    """Takes the text of one answer, special tokens included, in pieces, and gives out (thoughts, text, calls)
    as they become certain.

    What is held back meanwhile follows from all of the text so far, wherever its pieces end: calls until they
    end, with `at_once` thoughts too, and a part of a tag. What cannot be read as a call of a tool is text.

    Args:
        forced: reads what the final channel says, when that is calls that a grammar forces.
        thoughts_stay: they are text, in their place among what else is said.
    """

    def __init__(
        self,
        tools: Tools,
        at_once: bool = False,
        forced: ForcedCalls | None = None,
        thoughts_stay: bool = False,
    ):
        super().__init__()
        self._tools, self._at_once, self._forced = tools, at_once, forced
        self._thoughts_stay = thoughts_stay
        self._channel: str | None = None  # of the message whose text comes; None: between messages
        self._tool: str | None = None  # whom that message calls

    def feed(self, text: str, is_last: bool = False) -> tuple[str, str, list[ToolCall]]:
        self._hold(text)
        thoughts: list[str] = []
        texts: list[str] = []
        calls: list[ToolCall] = []
        while True:
            is_header = self._channel is None and self._held.startswith(BEGINS)
            if is_header and not self._begin(is_last):
                break
            body, has_ended = self._take(is_last)
            if self._tool is not None and body:
                call = read_arguments(self._tool, body) if self._tool in self._tools else None
                texts += [body] if call is None else []
                calls += [] if call is None else [call]
            elif self._forced is not None and self._channel == FINAL:
                said, more = self._forced.feed(body, has_ended or is_last)
                texts.append(said)
                calls += more
            else:
                is_thought = self._channel == THOUGHTS and not self._thoughts_stay
                (thoughts if is_thought else texts).append(body)
            if not has_ended:
                break
            self._channel = self._tool = None
        return "".join(thoughts), "".join(texts), calls

    def _begin(self, is_last: bool) -> bool:
        """Whether a message's text begins."""
        header, found, rest = self._held.partition(MESSAGE)
        if not found:
            self._held = "" if is_last else self._held
            return False
        _, _, channel = header.partition("<|channel|>")
        recipient = RECIPIENT.search(header)
        self._channel = (channel.split() or [""])[0].partition("<|")[0]
        self._tool = recipient and recipient[1]
        self._held = rest
        return True

    def _take(self, is_last: bool) -> tuple[str, bool]:
        """What of a message's text is certain, and whether that is its end."""
        held = self._held
        found = TAG.search(held, max(0, self._searched - LONGEST))
        self._searched = 0
        if found:
            body, self._held = (
                held[: found.start()],
                held[found.end() if found[0] in ENDS else found.start() :],
            )
            return body, True
        if is_last:
            count = len(held)
        elif self._tool is not None or (self._at_once and self._channel == THOUGHTS):
            count, self._searched = 0, len(held)
        else:
            at = held.rfind("<")
            is_tag = at >= 0 and any(tag.startswith(held[at:]) for tag in (*BEGINS, *ENDS))
            count = at if is_tag else len(held)
        self._held = held[count:]
        return held[:count], False
