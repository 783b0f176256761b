"""Stop strings in a stream of text pieces, wherever the borders of the pieces fall.

One automaton a stop string (Source: Knuth, Morris, Pratt 1977), so the work is proportional to the
new characters, and the longest text that may still become a stop string is known exactly.
"""

from collections.abc import Sequence


class StopMatcher:
    """Finds the first stop string to be completed. Text that may be the beginning of one is held back.

    `keep` leaves the matched string in the text (SGLang's no_stop_trim).
    """

    def __init__(self, stops: Sequence[str], keep: bool = False):
        self._stops = [(s, _failure(s)) for s in stops if s]
        self._matched = [0] * len(self._stops)  # characters of each stop string that the text ends with
        self._keep = keep
        self._held = ""

    @property
    def held(self) -> str:
        """The text held back: it may be the beginning of a stop string."""
        return self._held

    def feed(self, text: str, may_stop: bool = True) -> tuple[str, str | None]:
        """(text that is final, the stop string completed by this piece or None).

        Nothing may be fed after a match. With `may_stop` false, completed strings are passed over.
        """
        if not self._stops:
            return text, None
        buffer = self._held + text
        for end in range(len(self._held), len(buffer)):
            stop = self._step(buffer[end])
            if stop is not None and may_stop:
                cut = end + 1 if self._keep else end + 1 - len(stop)
                self._held = ""
                return buffer[:cut], stop
        hold = max(self._matched)
        self._held = buffer[len(buffer) - hold :] if hold else ""
        return buffer[: len(buffer) - hold], None

    def flush(self) -> str:
        """The text held back, once no more will follow."""
        held, self._held = self._held, ""
        return held

    def _step(self, char: str) -> str | None:
        """Advance every automaton; the longest stop string completed by `char`, if any."""
        completed = None
        for i, (stop, failure) in enumerate(self._stops):
            k = self._matched[i]
            while k and stop[k] != char:
                k = failure[k]
            if stop[k] == char:
                k += 1
            if k == len(stop):
                if completed is None or len(stop) > len(completed):
                    completed = stop
                k = failure[k]
            self._matched[i] = k
        return completed


def _failure(pattern: str) -> list[int]:
    """failure[k]: length of the longest proper prefix of pattern[:k] that is also its suffix."""
    failure = [0, 0]
    for char in pattern[1:]:
        k = failure[-1]
        while k and pattern[k] != char:
            k = failure[k]
        failure.append(k + 1 if pattern[k] == char else 0)
    return failure
