"""Thoughts and answers: by hand for each family, and alike wherever the pieces of a text end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.text.reasoning import STYLES, Thoughts

QWEN, R1 = STYLES["qwen3"], STYLES["deepseek-r1"]
CASES = {
    "tagged": (QWEN, "", "<think>\nTwo and two.\n</think>\n\nFour.", ("Two and two.", "Four.")),
    "white space before the tag": (QWEN, "", "\n<think>a</think>b", ("a", "b")),
    "no thoughts": (QWEN, "", " Four. <think>", ("", " Four. <think>")),
    "empty thoughts": (QWEN, "", "<think>\n\n</think>\n\nFour.\n", ("", "Four.\n")),
    "never ends": (QWEN, "", "<think>\nTwo </think ", ("Two </think", "")),
    "a part of the tag and no more": (QWEN, "", "<thin", ("", "<thin")),
    "the prompt opens them": (QWEN, "Hi<think>\n", "\nTwo\n</think>Four", ("Two", "Four")),
    "the prompt opens them, and so does the model": (QWEN, "<think>", "<think>Two</think>4", ("Two", "4")),
    "the prompt closes them": (QWEN, "<think>\n\n</think>\n\n", "<think> Four", ("", "<think> Four")),
    "always, without a tag": (R1, "", "Two\n</think>\n\nFour", ("Two", "Four")),
    "always, but the prompt closes them": (R1, "</think>", "Four", ("", "Four")),
    "always, and never ends": (R1, "", " Two", ("Two", "")),
    "a second pair": (QWEN, "", "<think>a</think>b<think>c</think>", ("a", "b<think>c</think>")),
    "other tags": (STYLES["kimi"], "", "◁think▷<think>◁/think▷b", ("<think>", "b")),
    "nothing": (QWEN, "", "", ("", "")),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_thoughts_are_told_from_the_answer(name):
    style, prompt, text, expected = CASES[name]
    assert Thoughts(style, prompt).feed(text, is_last=True) == expected
    assert in_pieces(style, prompt, list(text)) == expected


def in_pieces(style, prompt, pieces, at_once=False):
    thoughts = Thoughts(style, prompt, at_once=at_once)
    given_out = [thoughts.feed(piece) for piece in pieces] + [thoughts.feed("", is_last=True)]
    return tuple("".join(parts) for parts in zip(*given_out))


FRAGMENTS = st.sampled_from(
    ["<think>", "</think>", "<", "</", "th", "think>", " ", "\n", "x", "<think", "nk>"]
)


@given(
    st.lists(FRAGMENTS, max_size=12), st.sampled_from(["", "<think>\n", "</think>"]), st.booleans(), st.data()
)
def test_pieces_of_a_text_give_what_the_text_gives(fragments, prompt, always, data):
    """After each piece too, however the text before it was cut: a stream that another worker goes on with."""
    style, text = R1 if always else QWEN, "".join(fragments)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    at_once = data.draw(st.booleans())
    thoughts, so_far = Thoughts(style, prompt, at_once=at_once), ["", ""]
    for begin, end in zip([0, *cuts], [*cuts, len(text)]):
        for i, part in enumerate(thoughts.feed(text[begin:end])):
            so_far[i] += part
        assert tuple(so_far) == Thoughts(style, prompt, at_once=at_once).feed(text[:end])
    whole = tuple(so_far[i] + part for i, part in enumerate(thoughts.feed("", is_last=True)))
    assert whole == Thoughts(style, prompt).feed(text, is_last=True)


@pytest.mark.parametrize(
    "continued, text, expected",
    [
        ("<think>\nLet me", " see.</think>Four", ("see.", "Four")),
        ("<think>a</think>The answer", " is 4 <think>", ("", " is 4 <think>")),
        ("The answer", " is 4", ("", " is 4")),
    ],
)
@pytest.mark.parametrize("style", [QWEN, R1])
def test_answer_that_goes_on_thinks_if_its_beginning_did(style, continued, text, expected):
    assert (
        Thoughts(style, "assistant\n" + continued, continued=continued).feed(text, is_last=True) == expected
    )


def test_a_call_ends_thoughts_that_nothing_else_ends():
    thoughts = Thoughts(QWEN, "", call="<tool_call>")
    pieces = ["<think>I call", "\n<tool", "_call>now</tool_call>"]
    assert [thoughts.feed(piece) for piece in pieces] == [
        ("I call", ""), ("", ""), ("", "<tool_call>now</tool_call>")
    ]  # fmt: skip


def test_thoughts_come_as_soon_as_they_are_certain_or_at_once():
    pieces = ["<think>", "Two ", "and", "\n</", "b> two", "\n</thi", "nk>", "\n", "Four", "."]
    expected = [("", ""), ("Two", ""), (" and", ""), ("", ""), ("\n</b> two", ""), ("", ""), ("", ""),
                ("", ""), ("", "Four"), ("", ".")]  # fmt: skip
    thoughts = Thoughts(QWEN, "")
    assert [thoughts.feed(piece) for piece in pieces] == expected
    thoughts = Thoughts(QWEN, "", at_once=True)
    expected = [("", "")] * 6 + [("Two and\n</b> two", ""), ("", ""), ("", "Four"), ("", ".")]
    assert [thoughts.feed(piece) for piece in pieces] == expected
