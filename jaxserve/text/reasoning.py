"""What a reasoning model thinks, apart from what it answers.

Such models write their thoughts between two tags. `Thoughts` takes one answer apart as it comes.
"""

from dataclasses import dataclass
from enum import Enum

from jaxserve.text.tags import num_uncertain


@dataclass(frozen=True)
class ReasoningStyle:
    """The tags of a family, and whether its answers begin with thoughts though no tag opens them."""

    opening: str = "<think>"
    closing: str = "</think>"
    always: bool = False


# By the names of SGLang's --reasoning-parser.
STYLES = {
    "deepseek-r1": ReasoningStyle(always=True),
    "deepseek-v3": ReasoningStyle(),
    "glm45": ReasoningStyle(),
    "kimi": ReasoningStyle("◁think▷", "◁/think▷"),
    "qwen3": ReasoningStyle(),
    "qwen3-thinking": ReasoningStyle(always=True),
    "step3": ReasoningStyle(always=True),
}

State = Enum("State", ["BEFORE", "THINKING", "ANSWERING"])


class Thoughts:
    """Takes the text of one answer in pieces, and gives out (thoughts, answer) as they become certain.

    What is held back meanwhile follows from all of the text so far, wherever its pieces end: a part of a
    tag, white space around the thoughts, which belongs to neither, and with `at_once` the thoughts until
    they end.

    Args:
        prompt: its end. A template may open the thoughts there, or close them.
    """

    def __init__(self, style: ReasoningStyle, prompt: str, at_once: bool = False):
        self._style, self._at_once = style, at_once
        prompt = prompt.rstrip()
        self._state = State.ANSWERING if prompt.endswith(style.closing) else State.BEFORE
        thinks = style.always or prompt.endswith(style.opening)
        self._untagged = State.THINKING if thinks else State.ANSWERING  # what begins without a tag
        self._held = ""
        self._trims = False  # white space where thoughts or the answer behind them begin

    def feed(self, text: str, is_last: bool = False) -> tuple[str, str]:
        self._held += text
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
        end = self._held.find(self._style.closing)
        if end < 0 and not is_last:
            if self._at_once:
                return ""
            return self._take(len(self._held) - num_uncertain(self._held, self._style.closing))
        thoughts = self._take(len(self._held) if end < 0 else end).rstrip()
        if end >= 0:
            self._state, self._trims = State.ANSWERING, True
            self._held = self._held[len(self._style.closing) :]
        return thoughts

    def _take(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        if self._trims:
            taken = taken.lstrip()
            self._trims = not taken
        return taken
