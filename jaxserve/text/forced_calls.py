"""Calls that a grammar forces (`grammar.of_calls`): a list in JSON, [{"name": ..., "parameters": {...}}]."""

import re

from jaxserve.text.tags import Holder, num_uncertain
from jaxserve.text.tool_calls import DECODER, ToolCall, Tools, call_of

MARK = re.compile(r'[{}\[\]"]')
MARK_IN_STRING = re.compile(r'["\\]')
BETWEEN = " \t\r\n,"


class ForcedCalls(Holder):
    """Takes the text of one answer in pieces, and gives out (text, calls) as they become certain.

    Each call comes when its object closes. What is no call stays text: an answer that is no such list, and
    an object that is cut off.

    Args:
        behind: a tag. The text up to its end is text, and the list begins behind it.
    """

    def __init__(self, tools: Tools, behind: str = ""):
        super().__init__()
        self._tools, self._behind = tools, behind
        self._in_list = self._is_text = False
        self._bracket = ""  # with which the list began, until a call has come
        self._depth = 0  # of brackets in `_held[: self._searched]`
        self._in_string = False

    def feed(self, text: str, is_last: bool = False) -> tuple[str, list[ToolCall]]:
        self._hold(text)
        before = "" if self._in_list or self._is_text else self._begin(is_last)
        calls: list[ToolCall] = []
        while self._in_list and (call := self._next_call()):
            calls.append(call)
        if not self._is_text and not is_last:
            return before, calls
        rest, self._held = self._held, ""
        if self._in_list:
            rest = rest.lstrip(BETWEEN)
        if self._bracket and (self._in_list or self._is_text):
            rest, self._bracket = self._bracket + rest, ""
        return before + rest, calls

    def _begin(self, is_last: bool) -> str:
        """The text before the list, as far as there is more of it."""
        before = ""
        if self._behind:
            end = self._held.find(self._behind)
            if end < 0:
                certain = len(self._held) - (0 if is_last else num_uncertain(self._held, [self._behind]))
                before, self._held = self._held[:certain], self._held[certain:]
                return before
            end += len(self._behind)
            before, self._held, self._behind = self._held[:end], self._held[end:], ""
        begun = self._held.lstrip()
        if begun.startswith("["):
            self._in_list, self._held, self._searched = True, begun[1:], 0
            self._bracket = "["
        elif begun:
            self._is_text = True
        return before

    def _next_call(self) -> ToolCall | None:
        """The next object of the list, once it is whole. One that is no call ends the list: it is text."""
        if self._searched == 0:
            self._held = self._held.lstrip(BETWEEN)
            if self._held.startswith("]"):
                self._held = self._held[1:].lstrip()
                self._in_list, self._is_text = False, True
                return None
        end = self._end_of_object()
        if end < 0:
            return None
        try:
            call = call_of(DECODER.decode(self._held[:end]))
        except (ValueError, RecursionError):
            call = None
        if call is None or call.name not in self._tools:
            self._in_list, self._is_text = False, True
            return None
        self._held, self._searched, self._bracket = self._held[end:], 0, ""
        return call

    def _end_of_object(self) -> int:
        """Where the object that `_held` begins with ends; -1: not yet. Looks at each character once."""
        held = self._held
        while found := (MARK_IN_STRING if self._in_string else MARK).search(held, self._searched):
            mark = found[0]
            if mark == "\\" and found.end() == len(held):  # what it escapes has not come
                self._searched = found.start()
                return -1
            self._searched = found.end() + (mark == "\\")
            if mark == '"':
                self._in_string = not self._in_string
            elif mark != "\\":
                self._depth += 1 if mark in "{[" else -1
                if self._depth <= 0:
                    self._depth = 0
                    return self._searched
        self._searched = len(held)
        return -1
