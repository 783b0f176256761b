"""Speculative decoding through the whole engine: the tokens are those of one at a time, only sooner."""

from pathlib import Path

import numpy as np
import pytest

from tests.engine.asking import Golden, Row, ask, check_greedy, golden_rows, greedy, tokens

TINY = str(Path(__file__).parents[2] / "configs" / "tiny-deepseek")
NGRAM = {
    "speculative_algorithm": "NGRAM",
    "speculative_num_draft_tokens": 5,
    "speculative_ngram_min_match_window_size": 1,  # many guesses, many of them wrong
}
FEW = {str(t): 100.0 for t in (20, 21)}  # outputs of two tokens repeat, but not for long
ALWAYS = {"9": 100.0}
TOLERANCE = 2e-4  # of logprobs: two logits of 1e-4 each, see test_families.py
PROMPT = [5, 6, 7, 8] * 5
LAYOUTS = {
    "llama": {},
    "mixtral": {"tp": 2},
    "deepseek_v3": {"tp": 2, "dp_size": 2, "enable_dp_attention": True, "ep": 2},
}


def random(prompt, new, **params) -> Row:
    return Row(prompt, {"max_new_tokens": new, "ignore_eos": True, **params})


def crowd(family: str) -> list[Row]:
    """More than there are slots, of every kind, some with long prompts beside the others' decoding."""
    return [
        greedy(PROMPT, 40, logit_bias=FEW),
        greedy(PROMPT, 30, logit_bias=ALWAYS),
        random(PROMPT[:3], 40, logit_bias=FEW, sampling_seed=5, temperature=0.7),
        random(PROMPT[:3], 20, logit_bias=FEW, sampling_seed=6, top_k=2, top_p=0.9),
        greedy(PROMPT, 20, logit_bias=FEW, frequency_penalty=0.5),
        greedy(PROMPT, 40, logit_bias=FEW, stop_token_ids=[21, 20], min_new_tokens=13),
        greedy(PROMPT, 40, logit_bias=ALWAYS, stop_token_ids=[9], min_new_tokens=7),
        greedy(list(range(3, 100)), 9, logit_bias=ALWAYS),
        *golden_rows(Golden.read(family)),
    ]


@pytest.mark.parametrize("family", LAYOUTS)
def test_tokens_and_logprobs_are_those_without_speculation(engine, family):
    rows = crowd(family)
    plain = ask(engine(family), rows, return_logprob=True, top_logprobs_num=2)
    fast = engine(family, **NGRAM, **LAYOUTS[family])
    replies = ask(fast, rows, return_logprob=True, top_logprobs_num=2)
    check_greedy(Golden.read(family), replies[8:])
    assert tokens(replies)[:8] == tokens(plain)[:8]
    for with_drafts, without in zip(replies[:8], plain):
        assert np.allclose(scores(with_drafts), scores(without), atol=TOLERANCE, rtol=0)
    meta = [reply["meta_info"] for reply in replies]
    assert meta[1]["spec_accept_token_num"] > 15 and meta[1]["spec_verify_ct"] < 15
    assert meta[4]["spec_draft_token_num"] == 0, "penalties count each token before the next"
    assert all("spec_verify_ct" not in reply["meta_info"] for reply in plain)


def scores(reply) -> list[list[float]]:
    """(logprob, logprobs of the likeliest two) of each output token."""
    meta = reply["meta_info"]
    pairs = zip(meta["output_token_logprobs"], meta["output_top_logprobs"], strict=True)
    return [[own[0], *(entry[0] for entry in top)] for own, top in pairs]


def test_retracted_requests_resume_with_their_tokens_without_the_cache_too(engine):
    rows = [greedy([t, 6, 7], 100, logit_bias=FEW) for t in range(30, 34)]
    small = engine("llama", **NGRAM, max_total_tokens=128, disable_radix_cache=True)
    replies = ask(small, rows)
    assert tokens(replies) == tokens(ask(engine(), rows))
    assert sum(reply["meta_info"]["num_retractions"] for reply in replies) > 0
    assert sum(reply["meta_info"]["spec_accept_token_num"] for reply in replies) > 50


def test_cached_pages_hold_only_accepted_tokens(engine):
    """A conversation goes on from pages in which drafts were right and wrong."""
    fast = engine("llama", **NGRAM)
    [first] = ask(fast, [greedy(PROMPT, 40, logit_bias=FEW)])
    assert 0 < first["meta_info"]["spec_accept_token_num"] < first["meta_info"]["spec_draft_token_num"]
    following = [greedy(PROMPT + first["output_ids"] + [3, 4], 20)]
    [again] = ask(fast, following)
    assert again["meta_info"]["cached_tokens"] >= 48
    assert tokens([again]) == tokens(ask(engine(), following))


def test_client_that_leaves_amid_drafts_costs_nothing(engine):
    fast = engine("llama", **NGRAM)
    stream = fast.generate(
        input_ids=PROMPT, sampling_params={"max_new_tokens": 400, "logit_bias": ALWAYS}, stream=True
    )
    assert len(next(stream)["output_ids"]) >= 1
    stream.close()
    assert tokens(ask(fast, [greedy(PROMPT, 5, logit_bias=ALWAYS)])) == [[9] * 5]


def test_stop_strings_and_samples_of_a_text_are_those_without_speculation(engine):
    text = "The list is sorted in place. The list is sorted in place. The list is sorted in"
    asked = {"temperature": 0, "max_new_tokens": 60, "ignore_eos": True}
    options = {"skip_tokenizer_init": False, "max_running_requests": 2}
    plain, fast = engine(TINY, **options), engine(TINY, **options, **NGRAM)
    whole = fast.generate(text, asked)
    assert whole["text"] == plain.generate(text, asked)["text"]
    assert whole["meta_info"]["spec_accept_token_num"] >= 10
    stop = whole["text"][9:14]
    for params in (asked | {"stop": [stop]}, asked | {"stop": [stop, "zz"], "no_stop_trim": True}):
        replies = [e.generate(text, params) for e in (plain, fast)]
        assert replies[0]["text"] == replies[1]["text"]
        assert replies[0]["output_ids"] == replies[1]["output_ids"]
        assert replies[1]["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    drawn = {"temperature": 0.3, "n": 3, "sampling_seed": 11, "max_new_tokens": 40}
    texts = [[reply["text"] for reply in e.generate(text, drawn)] for e in (plain, fast)]
    assert texts[0] == texts[1]


def test_engine_counts_drafts_and_those_accepted(engine):
    fast = engine("llama", **NGRAM)
    before = fast.stats()
    [reply] = ask(fast, [greedy(PROMPT, 30, logit_bias=ALWAYS)])
    after, meta = fast.stats(), reply["meta_info"]
    assert after["spec_drafted"][0] - before["spec_drafted"][0] == meta["spec_draft_token_num"] > 0
    assert after["spec_accepted"][0] - before["spec_accepted"][0] == meta["spec_accept_token_num"] > 0
    assert meta["spec_accept_length"] == 1 + meta["spec_accept_token_num"] / meta["spec_verify_ct"]
    [load] = fast.loads()
    assert 1 < load["speculative"]["accept_length"] <= 5 and 0 < load["speculative"]["accept_rate"] <= 1


def test_large_batch_goes_without_drafts(engine):
    fast = engine("llama", speculative_algorithm="NGRAM", speculative_max_rows=2)
    replies = ask(fast, [greedy(PROMPT, 20, logit_bias=ALWAYS)] * 4)
    assert tokens(replies) == [[9] * 20] * 4
    assert [reply["meta_info"]["spec_draft_token_num"] for reply in replies] == [0] * 4
