"""Answers in channels: by hand, and alike wherever the pieces of a text end."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.text.channels import Channels

TOOLS = {"weather": {}}
ANALYSIS = "<|channel|>analysis<|message|>They greet.<|end|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>Hello!"
HEADER = "<|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
CALL = HEADER + '{"city": "Köln"}'
CALLED = ("weather", {"city": "Köln"})
CASES = {
    "thoughts and an answer": (ANALYSIS + FINAL, ("They greet.", "Hello!", [])),
    "thoughts and a call": (ANALYSIS + CALL, ("They greet.", "", [CALLED])),
    "a call that ends, and another": (ANALYSIS + CALL + "<|call|>" + CALL, ("They greet.", "", [CALLED] * 2)),
    "recipient beside the role": (
        '<|start|>assistant to=functions.weather<|channel|>commentary<|message|>{"city": "Köln"}',
        ("", "", [CALLED]),
    ),
    "said before a call": (
        "<|channel|>commentary<|message|>I look.<|end|>" + CALL, ("", "I look.", [CALLED])
    ),
    "an answer alone": ("<|channel|>final<|message|>Hello!<|return|>", ("", "Hello!", [])),
    "no channels": ("Hello <|there|>!", ("", "Hello <|there|>!", [])),
    "cut off in thoughts": ("<|channel|>analysis<|message|>They <|en", ("They <|en", "", [])),
    "cut off in a header": (ANALYSIS + "<|start|>assistant<|chan", ("They greet.", "", [])),
    "cut off in a call": (CALL[:-4], ("", '{"city": "Kö', [])),
    "unknown tool": (CALL.replace("weather", "other"), ("", '{"city": "Köln"}', [])),
    "no object": (CALL.replace('{"city": "Köln"}', "[1]"), ("", "[1]", [])),
    "the next message without an end": (ANALYSIS[:-7] + FINAL, ("They greet.", "Hello!", [])),
    "nothing": ("", ("", "", [])),
}  # fmt: skip


def summed(parts):
    thoughts, texts, calls = zip(*parts)
    return "".join(thoughts), "".join(texts), [(c.name, json.loads(c.arguments)) for cs in calls for c in cs]


@pytest.mark.parametrize("name", CASES)
def test_channels_are_told_apart(name):
    text, expected = CASES[name]
    for at_once in (False, True):
        for pieces in ([text], list(text)):
            channels = Channels(TOOLS, at_once)
            parts = [channels.feed(piece) for piece in pieces] + [channels.feed("", is_last=True)]
            assert summed(parts) == expected
            if at_once and expected[0]:
                assert [thoughts for thoughts, _, _ in parts if thoughts] == [expected[0]]


def test_thoughts_that_stay_are_text_in_their_place():
    looks = "<|channel|>commentary<|message|>I look.<|end|>"
    channels = Channels(TOOLS, thoughts_stay=True)
    assert summed([channels.feed(looks + ANALYSIS + FINAL, is_last=True)]) == (
        "", "I look.They greet.Hello!", [],
    )  # fmt: skip


FRAGMENTS = (
    ANALYSIS, FINAL, CALL, "<|end|>", "<|start|>", "<|channel|>", "<|message|>", "<|", "<", "end|>", "x", " ",
    "analysis", "<|call|>", "{}",
)  # fmt: skip


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=8), st.booleans(), st.booleans(), st.data())
def test_pieces_of_a_text_give_what_the_text_gives(fragments, at_once, thoughts_stay, data):
    """After each piece too, however the text before it was cut: a stream that another worker goes on with."""
    text = "".join(fragments)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    how = {"at_once": at_once, "thoughts_stay": thoughts_stay}
    channels, parts = Channels(TOOLS, **how), []
    for begin, end in zip([0, *cuts], [*cuts, len(text)]):
        parts.append(channels.feed(text[begin:end]))
        assert summed(parts) == summed([Channels(TOOLS, **how).feed(text[:end])])
    parts.append(channels.feed("", is_last=True))
    whole = Channels(TOOLS, thoughts_stay=thoughts_stay)
    assert summed(parts) == summed([whole.feed(text, is_last=True)])
