"""What a reasoning model thinks, apart from what it answers.

Such models write their thoughts between two tags. `Thoughts` takes one answer apart as it comes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from jaxserve.text.tags import Holder, find_first, num_uncertain


@dataclass(frozen=True)
class ReasoningStyle:
    """The tags of a family.

    Args:
        always: answers begin with thoughts though no tag opens them.
        on_request: it thinks where the template is told `thinking`; others, unless told not to.
    """

    opening: str = "<think>"
    closing: str = "</think>"
    always: bool = False
    on_request: bool = False


# By the names of SGLang's --reasoning-parser.
STYLES = {
    "deepseek-r1": ReasoningStyle(always=True),
    "deepseek-v3": ReasoningStyle(on_request=True),
    "glm45": ReasoningStyle(),
    "kimi": ReasoningStyle("◁think▷", "◁/think▷"),
    "kimi_k2": ReasoningStyle(),
    "minimax": ReasoningStyle(),
    "qwen3": ReasoningStyle(),
    "qwen3-thinking": ReasoningStyle(always=True),
    "step3": ReasoningStyle(always=True),
}

State = Enum("State", ["BEFORE", "THINKING", "ANSWERING"])


class Thoughts(Holder):
    """Takes the text of one answer in pieces, and gives out (thoughts, answer) as they become certain.

    What is held back meanwhile follows from all of the text so far, wherever its pieces end: a part of a
    tag, white space around the thoughts, which belongs to neither, and with `at_once` the thoughts until
    they end.

    Args:
        prompt: its end. A template may open the thoughts there, or close them.
        continued: what the answer has said already, which it goes on with.
        call: the tag that begins a call of a tool: models call in the midst of their thoughts too.
    """

    def __init__(
        self,
        style: ReasoningStyle,
        prompt: str,
        *,
        continued: str = "",
        call: str | None = None,
        at_once: bool = False,
    ):
        super().__init__()
        self._style, self._at_once = style, at_once
        self._ends = [style.closing, *([call] if call else [])]
        self._state, self._untagged = _first_state(style, prompt.rstrip(), continued)
        # White space where thoughts or the answer behind them begin.
        self._trims = self._state is State.THINKING

    def feed(self, text: str, is_last: bool = False) -> tuple[str, str]:
        self._hold(text)
        thoughts = answer = ""
        if self._state is State.BEFORE:
            self._begin(is_last)
        if self._state is State.THINKING:
            thoughts = self._think(is_last)
        if self._state is State.ANSWERING:
            answer = self._take(len(self._held))
        return thoughts, answer

    def _begin(self, is_last: bool) -> None:
        opening, begun = self._style.opening, self._held.lstrip()
        if begun.startswith(opening):
            self._state, self._held = State.THINKING, begun[len(opening) :]
        elif is_last or not opening.startswith(begun):
            self._state = self._untagged
        self._trims = self._state is State.THINKING

    def _think(self, is_last: bool) -> str:
        longest = max(map(len, self._ends))
        end, tag = find_first(self._held, self._ends, max(0, self._searched - longest))
        if end < 0 and not is_last:
            if self._at_once:
                self._searched = len(self._held)
                return ""
            return self._take(len(self._held) - num_uncertain(self._held, self._ends))
        thoughts = self._take(len(self._held) if end < 0 else end).rstrip()
        if end >= 0:
            self._state, self._trims = State.ANSWERING, True
            if tag == self._style.closing:
                self._held = self._held[len(tag) :]
        return thoughts

    def _take(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        if self._trims:
            taken = taken.lstrip()
            self._trims = not taken
        return taken


def will_think(
    style: ReasoningStyle, prompt: str, continued: str, variables: Mapping[str, Any]
) -> bool | None:
    """Whether an answer is going to close thoughts; None: if it opens them.

    Args:
        prompt: its end.
        continued: what the answer has said already.
        variables: which the request gives to the chat template.
    """
    state, untagged = _first_state(style, prompt.rstrip(), continued)
    if state is not State.BEFORE or untagged is State.THINKING:
        return state is not State.ANSWERING
    switches = [variables[name] for name in ("enable_thinking", "thinking") if name in variables]
    return None if (any if style.on_request else all)(switches) else False


def _first_state(style: ReasoningStyle, prompt: str, continued: str) -> tuple[State, State]:
    """(the state an answer begins in, what follows BEFORE where no tag opens thoughts)."""
    if continued:
        thinks = continued.rfind(style.opening) > continued.rfind(style.closing)
        return (State.THINKING if thinks else State.ANSWERING), State.ANSWERING
    thinks = style.always or prompt.endswith(style.opening)
    is_closed = prompt.endswith(style.closing)
    return (State.ANSWERING if is_closed else State.BEFORE), (State.THINKING if thinks else State.ANSWERING)
