"""Stop strings across the borders of text pieces."""

from hypothesis import given
from hypothesis import strategies as st

from jaxserve.text.stop import StopMatcher

AB = st.text("ab", max_size=30)
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3)


def run(pieces, stops, keep=False):
    """(all text given out, the stop string matched or None)."""
    matcher, out = StopMatcher(stops, keep), ""
    for piece in pieces:
        text, matched = matcher.feed(piece)
        out += text
        if matched is not None:
            return out, matched
    return out + matcher.flush(), None


def test_stop_string_in_one_piece_is_cut_off():
    assert run(["one STOP two"], ["STOP"]) == ("one ", "STOP")


def test_stop_string_over_three_pieces_is_cut_off():
    assert run(["one S", "TO", "P two"], ["STOP"]) == ("one ", "STOP")


def test_no_stop_trim_keeps_the_string_and_drops_what_follows():
    assert run(["one S", "TOP two"], ["STOP"], keep=True) == ("one STOP", "STOP")


def test_beginning_of_a_stop_string_is_held_back_until_it_is_decided():
    matcher = StopMatcher(["\n\nUser:"])
    assert matcher.feed("Hi\n") == ("Hi", None)
    assert matcher.feed("\nUs") == ("", None)
    assert matcher.feed("ual") == ("\n\nUsual", None)


def test_held_text_is_given_out_at_the_end():
    assert run(["Hi ST"], ["STOP"]) == ("Hi ST", None)


def test_overlapping_restart_is_found():
    assert run(["a", "a", "b"], ["ab"]) == ("a", "ab")
    assert run(["aabaa", "ab"], ["aab" * 2]) == ("aabaaab", None)


def test_first_completed_string_wins_and_the_longest_of_those():
    assert run(["xabcd"], ["abcd", "bc"]) == ("xa", "bc")
    assert run(["xabc"], ["bc", "abc"]) == ("x", "abc")


def test_strings_completed_before_the_minimum_are_passed_over():
    matcher = StopMatcher(["ab"])
    assert matcher.feed("ab", may_stop=False) == ("ab", None)
    assert matcher.feed("cab") == ("c", "ab")


def test_no_stop_strings_hold_nothing_back():
    assert StopMatcher([]).feed("abc") == ("abc", None)


@given(AB, STOPS, st.integers(1, 5))
def test_piece_borders_do_not_matter(text, stops, size):
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    assert run(pieces, stops) == run([text], stops)


@given(AB, STOPS)
def test_result_is_the_text_before_the_stop_that_ends_first(text, stops):
    ends = [(text.find(s) + len(s), -len(s), s) for s in stops if s in text]
    if not ends:
        assert run([text], stops) == (text, None)
    else:
        end, _, stop = min(ends)
        assert run([text], stops) == (text[: end - len(stop)], stop)
