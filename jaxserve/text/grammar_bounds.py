"""What the grammar library may be given: how large, how much work.

Some small inputs cost it seconds or gigabytes, so they are bounded before it sees them. Measured with
llguidance 1.9.1 on one core: n optional parts in a row cost 0.33 us n^2 and 90 bytes n^2.
"""

import math
import re
from collections.abc import Iterable

MAX_CHARS = 100_000  # of a schema, a grammar, or all of a structural tag
MAX_REGEX_CHARS = 20_000
MAX_LITERAL_CHARS = 4_000  # of a text to be said as it is; masks of one of 90,000 take up to 460 ms
MAX_OPTIONAL_WORK = 500_000  # the sum of the squares of optional parts, over regexes: 0.2 s, 50 MB
OPTIONAL = re.compile(r"(?<!\()\?|[*{]|\|[|)]|[(:]\|")


class GrammarError(ValueError):
    """What was asked for cannot be a grammar; the message says why, in one line."""


def check_length(text: str, most: int = MAX_CHARS) -> None:
    if len(text) > most:
        raise GrammarError(f"it has {len(text)} characters; up to {most} are served")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON brings no such text, a caller in this process can
        raise GrammarError("it holds half a surrogate pair, which is no character") from None


def check_literals(texts: Iterable[str]) -> None:
    for text in texts:
        if len(text) > MAX_LITERAL_CHARS:
            raise GrammarError(
                f"it has a text of {len(text)} characters, {text[:20]!r}...; {MAX_LITERAL_CHARS} are served"
            )


def check_regexes(num_optional: list[int]) -> None:
    """`num_optional`: of the optional and repeated parts in each regex."""
    if sum(n * n for n in num_optional) > MAX_OPTIONAL_WORK:
        most = math.isqrt(MAX_OPTIONAL_WORK)
        raise GrammarError(
            f"it has too many optional and repeated parts; up to {most} in one regex are served"
        )


def count_optional(regex: str) -> int:
    return len(OPTIONAL.findall(regex))
