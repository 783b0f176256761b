"""Output made elsewhere, gone on with here: the tokens are those of the unbroken sequence."""

import msgspec
import pytest

from jaxserve.messages import Generate, Sampling
from tests.engine.asking import raw

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22]  # a page and a bit
NEW = 30
GREEDY = Sampling(max_new_tokens=NEW, temperature=0.0)
PENALTIES = {"frequency_penalty": 0.7, "presence_penalty": 0.4, "repetition_penalty": 1.2}
CASES = {
    "greedy": GREEDY,
    "seeded": Sampling(max_new_tokens=NEW, seed=11),
    "seeded and filtered": Sampling(max_new_tokens=NEW, seed=12, temperature=0.8, top_k=40, top_p=0.9),
    "penalized": Sampling(max_new_tokens=NEW, temperature=0.0, **PENALTIES),
    "penalized and seeded": Sampling(max_new_tokens=NEW, seed=13, **PENALTIES),
    "biased": Sampling(max_new_tokens=NEW, temperature=0.0, logit_bias={40: 3.0, 41: 3.5}),
}


def run(engine, sampling: Sampling, cuts: list[int], tokens: list[int]):
    """What comes after each cut, all asked at once."""
    requests = [
        Generate(rid=f"cut {cut}", input_ids=PROMPT, output_ids=tokens[:cut], sampling=sampling)
        for cut in cuts
    ]
    return raw(engine, *requests)


def ids(outputs) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


@pytest.mark.parametrize("sampling", CASES.values(), ids=CASES.keys())
def test_output_cut_anywhere_goes_on_with_the_same_tokens(engine, sampling):
    """More cuts than slots, so that they meet in all ways with the cache and with each other."""
    [outputs] = run(engine(), sampling, [0], [])
    whole = ids(outputs)
    assert len(whole) == NEW
    for cut, rest in zip(range(1, NEW), run(engine(), sampling, list(range(1, NEW)), whole)):
        assert whole[:cut] + ids(rest) == whole, f"cut after {cut}"
        assert rest[-1].finish.length == NEW
        assert rest[0].prompt_tokens == len(PROMPT)
        assert rest[0].cached_tokens <= len(PROMPT)


def test_penalties_make_a_difference_here(engine):
    """Or the test above would prove nothing of them."""
    [plain], [penalized] = (run(engine(), CASES[name], [0], []) for name in ("greedy", "penalized"))
    assert ids(plain) != ids(penalized)


def test_stop_tokens_are_barred_by_the_tokens_made_elsewhere_too(engine):
    """min_new_tokens counts all of them: the stop token comes where it would have come."""
    [outputs] = run(engine(), GREEDY, [0], [])
    stop = ids(outputs)[9]
    first = ids(outputs).index(stop)
    sampling = msgspec.structs.replace(GREEDY, stop_token_ids=(stop,), min_new_tokens=first + 3)
    [outputs] = run(engine(), sampling, [0], [])
    whole = ids(outputs)
    assert len(whole) > first + 2
    cuts = list(range(1, len(whole)))
    for cut, rest in zip(cuts, run(engine(), sampling, cuts, whole)):
        assert whole[:cut] + ids(rest) == whole
        assert rest[-1].finish == outputs[-1].finish


def test_resumed_sequence_reuses_what_is_cached_of_prompt_and_output(engine):
    """A long one: its pages come from the cache, and only the prompt's count as cached prompt tokens."""
    engine().flush_cache()
    sampling = msgspec.structs.replace(GREEDY, max_new_tokens=60)
    [outputs] = run(engine(), sampling, [0], [])
    whole = ids(outputs)
    steps = engine().stats()["steps"]
    [rest] = run(engine(), sampling, [50], whole)
    assert whole[:50] + ids(rest) == whole
    assert rest[0].cached_tokens == len(PROMPT)
    assert engine().stats()["steps"] - steps <= 12


@pytest.mark.parametrize(
    "tokens, message",
    [
        ([1] * NEW, "output_ids has 30 tokens already; max_new_tokens is 30"),
        ([1 << 20], "token id 1048576 is outside the vocabulary"),
    ],
)
def test_output_that_cannot_be_is_refused(engine, tokens, message):
    [[output]] = run(engine(), GREEDY, [len(tokens)], tokens)
    assert output.finish.status_code == 400
    assert message in output.finish.message


def test_resumed_sequence_survives_retraction(engine):
    """The pool is too small for all; whoever is retracted recomputes what was made elsewhere, too."""
    small = engine(max_total_tokens=192)
    sampling = msgspec.structs.replace(GREEDY, max_new_tokens=100)
    [outputs] = run(small, sampling, [0], [])
    whole = ids(outputs)
    before = small.stats()["retractions"]
    requests = [
        Generate(rid=str(i), input_ids=PROMPT, output_ids=whole[:20], sampling=sampling, cache_salt=str(i))
        for i in range(4)
    ]
    for rest in raw(small, *requests):
        assert whole[:20] + ids(rest) == whole
    assert small.stats()["retractions"] > before
