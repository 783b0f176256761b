"""Prompt lookup: what followed the longest earlier match of a sequence's end."""

import random

from jaxserve.engine.ngrams import MAX_CANDIDATES, Ngrams


def test_what_followed_the_earlier_place_is_proposed():
    assert Ngrams(2, 4).propose([1, 2, 3, 4, 5, 9, 1, 2], 3) == [3, 4, 5]


def test_nothing_is_proposed_where_too_little_matches():
    assert Ngrams(2, 4).propose([1, 2, 3, 4, 9, 2], 3) == []
    assert Ngrams(2, 4).propose([], 3) == Ngrams(2, 4).propose([7], 3) == []


def test_longest_match_wins_over_the_latest():
    tokens = [5, 1, 2, 10, 0, 6, 1, 2, 20, 0, 5, 1, 2]
    assert Ngrams(2, 3).propose(tokens, 1) == [10]
    assert Ngrams(2, 2).propose(tokens, 1) == [20]


def test_repetition_goes_on_past_the_end():
    assert Ngrams(2, 8).propose([1, 2, 3, 1, 2, 3], 7) == [1, 2, 3, 1, 2, 3, 1]


def test_growing_index_finds_what_a_search_finds():
    draw = random.Random(0)
    for _ in range(200):
        shortest = draw.randint(1, 3)
        longest = shortest + draw.randint(0, 3)
        ngrams, tokens = Ngrams(shortest, longest), draw.choices(range(4), k=draw.randint(0, 50))
        for end in range(len(tokens) + 1):
            assert ngrams.propose(tokens[:end], 3) == search(tokens[:end], shortest, longest)


def search(tokens, shortest, longest):
    """Every earlier place compared, in the plainest way."""
    end = len(tokens)

    def match_len(place):
        return max(
            n for n in range(longest + 1) if n <= place and tokens[place - n : place] == tokens[end - n :]
        )

    places = [p for p in range(end - 1, shortest - 1, -1) if match_len(p) >= shortest][:MAX_CANDIDATES]
    if end < shortest or not places:
        return []
    best = max(places, key=match_len)
    return [(tokens + tokens[best:] * 3)[best + i] for i in range(3)]
