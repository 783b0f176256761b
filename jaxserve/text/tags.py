"""Tags in a text that comes in pieces."""

from collections.abc import Sequence


def num_uncertain(text: str, tags: Sequence[str]) -> int:
    """Characters at the end that may be the white space before one of the tags, and its beginning."""
    longest = min(max(map(len, tags)) - 1, len(text))
    part = next(
        n for n in range(longest, -1, -1) if any(tag.startswith(text[len(text) - n :]) for tag in tags)
    )
    return len(text) - len(text[: len(text) - part].rstrip())


def find_first(text: str, tags: Sequence[str], start: int = 0) -> tuple[int, str]:
    """Where the first of the tags begins, from `start` on, and which one; at -1 none does."""
    places = [(text.find(tag, start), tag) for tag in tags]
    return min((place for place in places if place[0] >= 0), default=(-1, ""))
