"""Drafts by prompt lookup: what followed when the sequence's last tokens came before.

Where a text repeats itself or its prompt (code, summaries, extraction), the longest earlier match of
its end is a good guess of what comes next, and costs no model. Source: Saxena, "Prompt lookup decoding"
(2023).
"""

from collections.abc import Sequence

MAX_CANDIDATES = 8  # earlier places that are compared, the latest first: bounds a lookup


class Ngrams:
    """Where each n-gram of one growing sequence ends; a lookup takes microseconds at any length.

    Every place where the shortest n-gram ends is chained to the place before with an equal one; longer
    matches are found by comparing backwards from there.

    Args:
        shortest, longest: tokens that must match before anything is guessed, and that are compared.
    """

    def __init__(self, shortest: int, longest: int):
        self._shortest, self._longest = shortest, longest
        self._last: dict[tuple[int, ...], int] = {}  # n-gram -> the position after its last place
        self._before: list[int] = []  # by position: the same n-gram's place before; 0 is none

    def propose(self, tokens: Sequence[int], count: int) -> list[int]:
        """What followed the longest earlier match of the end of `tokens`: `count` of them, or none.

        `tokens` must go on from those of the last call. A match that overlaps the end is read in a
        circle, as a repetition goes on.
        """
        self._take(tokens)
        end, best, best_len = len(tokens), 0, 0
        place = self._before[end] if end >= self._shortest else 0
        for _ in range(MAX_CANDIDATES):
            if not place:
                break
            length = self._match_len(tokens, place, end)
            if length > best_len:
                best, best_len = place, length
                if length == self._longest:
                    break
            place = self._before[place]
        if not best:
            return []
        period = end - best
        return [tokens[best + i % period] for i in range(count)]

    def _take(self, tokens: Sequence[int]) -> None:
        n, last, before = self._shortest, self._last, self._before
        for end in range(len(before), len(tokens) + 1):
            if end < n:
                before.append(0)
                continue
            gram = tuple(tokens[end - n : end])
            before.append(last.get(gram, 0))
            last[gram] = end

    def _match_len(self, tokens: Sequence[int], place: int, end: int) -> int:
        length = self._shortest
        limit = min(self._longest, place)
        while length < limit and tokens[place - length - 1] == tokens[end - length - 1]:
            length += 1
        return length
