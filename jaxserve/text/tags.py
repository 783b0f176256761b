"""Tags in a text that comes in pieces."""


def num_uncertain(text: str, tag: str) -> int:
    """Characters at the end that may be the white space before a tag, and the tag's beginning."""
    part = next(n for n in range(min(len(tag) - 1, len(text)), -1, -1) if text.endswith(tag[:n]))
    return len(text) - len(text[: len(text) - part].rstrip())
