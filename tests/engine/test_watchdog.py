"""When an engine that says nothing is taken for frozen."""

import asyncio
from dataclasses import dataclass

import pytest

from jaxserve.engine_process import NUM_LOOKS, until_frozen


@dataclass
class Ear:
    """The part of a Connection that the watchdog looks at."""

    waits: bool = False
    last_heard_s: float = 0.0


class Ended(Exception):
    """The story is over, and the engine was not taken for frozen."""


def looks(*story: str) -> int:
    """After how many looks the engine is taken for frozen. Between two of them, one word of the story:

    asked: the engine owes an answer; says: it sends something, and owes more; answers: owes no more.
    """
    ear, words, count = Ear(), iter(story), 0

    async def sleep(seconds: float) -> None:
        nonlocal count
        if (word := next(words, None)) is None:
            raise Ended
        ear.waits = {"asked": True, "answers": False}.get(word, ear.waits)
        ear.last_heard_s += word in ("says", "answers")
        count += 1

    asyncio.run(until_frozen(ear, sleep))  # type: ignore[arg-type]
    return count


SILENCE = ["nothing"] * NUM_LOOKS


def test_engine_that_never_answers_is_frozen_after_the_full_time():
    assert looks("asked", *SILENCE, *SILENCE) == 1 + NUM_LOOKS


def test_silence_before_a_request_is_not_the_engines():
    """A server that nobody asked for an hour is asked, and looked at before it has answered."""
    with pytest.raises(Ended):
        looks(*SILENCE * 10, "asked", "answers", *SILENCE * 10, "asked", *SILENCE[1:])


def test_anything_said_is_a_sign_of_life():
    with pytest.raises(Ended):
        looks("asked", *SILENCE[1:], "says", *SILENCE[1:], "says", *SILENCE[1:])
    assert looks("asked", *SILENCE[1:], "says", *SILENCE, *SILENCE) == 2 * (1 + NUM_LOOKS)
