"""Speculative decoding through the whole engine: the tokens are those of one at a time, only sooner."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
HELD_OUT = (Path(TINY) / "held_out.txt").read_bytes()
TEXT = list(b"Return a list of the names that are defined in the module. If the")
DP_AND_EP = {"tp": 2, "dp_size": 2, "enable_dp_attention": True, "ep": 2}
MOVING = {"enable_eplb": True, "eplb_rebalance_num_iterations": 5}


@dataclass(frozen=True)
class Guessing:
    """A way to guess, the model that it is tried on, and outputs of which it guesses many, but not all."""

    model: str
    flags: dict[str, Any]
    prompt: list[int]
    often_right: dict[str, Any] = field(default_factory=dict)  # sampling parameters

    def row(self, new: int) -> Row:
        return greedy(self.prompt, new, **self.often_right)


NEXTN = {"speculative_algorithm": "NEXTN", "skip_tokenizer_init": False}
FROM_TEXT = Guessing("llama", NGRAM, PROMPT, {"logit_bias": FEW})
FROM_LAYER = Guessing(TINY, NEXTN, TEXT)
ways = pytest.mark.parametrize("way", [FROM_TEXT, FROM_LAYER], ids=["NGRAM", "NEXTN"])


def random(prompt, new, **params) -> Row:
    return Row(prompt, {"max_new_tokens": new, "ignore_eos": True, **params})


def crowd(prompt: list[int]) -> list[Row]:
    """More than there are slots, of every kind, some with long prompts beside the others' decoding."""
    return [
        greedy(prompt, 40, logit_bias=FEW),
        greedy(prompt, 30, logit_bias=ALWAYS),
        random(prompt[:3], 40, logit_bias=FEW, sampling_seed=5, temperature=0.7),
        random(prompt[:3], 20, logit_bias=FEW, sampling_seed=6, top_k=2, top_p=0.9),
        greedy(prompt, 20, logit_bias=FEW, frequency_penalty=0.5),
        greedy(prompt, 40, logit_bias=FEW, stop_token_ids=[21, 20], min_new_tokens=13),
        greedy(prompt, 40, logit_bias=ALWAYS, stop_token_ids=[9], min_new_tokens=7),
        greedy(list(range(3, 100)), 9, logit_bias=ALWAYS),
    ]


@pytest.mark.parametrize(
    "family, layout", [("llama", {}), ("mixtral", {"tp": 2}), ("deepseek_v3", DP_AND_EP | MOVING)]
)
def test_tokens_and_logprobs_are_those_without_speculation(engine, family, layout):
    rows = [*crowd(PROMPT), *golden_rows(Golden.read(family))]
    replies = ask_both(engine, family, {**NGRAM, **layout}, rows)
    check_greedy(Golden.read(family), replies[8:])
    assert replies[1]["meta_info"]["spec_accept_token_num"] > 15
    assert replies[1]["meta_info"]["spec_verify_ct"] < 15
    if MOVING.items() <= layout.items():
        assert engine(family, **NGRAM, **layout).stats()["experts"]["moved"] > 0


@pytest.mark.parametrize(
    "layout",
    [{}, {**DP_AND_EP, "max_total_tokens": 192, "speculative_num_steps": 2}],
    ids=["one device", "dp attention and experts over 2, two guesses, few pages"],
)
def test_tokens_and_logprobs_are_those_without_the_layer_for_multi_token_prediction(engine, layout):
    places = ((0, 40), (500, 120), (900, 80), (1500, 40))
    plain = [greedy(HELD_OUT[at : at + length], 40) for at, length in places]
    plain += [greedy(HELD_OUT[at : at + 20], 110) for at in range(2000, 2800, 200)]
    drawn = [random(TEXT, 40, sampling_seed=seed, temperature=0.4) for seed in (1, 2)]
    replies = ask_both(engine, TINY, {**NEXTN, **layout}, [*crowd(TEXT), *plain, *drawn])
    for reply in replies[8:]:
        assert reply["meta_info"]["spec_accept_token_num"] > 8, "of 40 tokens"
    retracted = sum(reply["meta_info"]["num_retractions"] for reply in replies)
    assert bool(retracted) == bool(layout)


def ask_both(engine, model: str, flags: dict[str, Any], rows: list[Row]) -> list[dict[str, Any]]:
    """Replies with speculation, held to those without up to the recorded rows. `rows` begin with a crowd."""
    plain = ask(engine(model, **without_speculation(flags)), rows, return_logprob=True, top_logprobs_num=2)
    replies = ask(engine(model, **flags), rows, return_logprob=True, top_logprobs_num=2)
    sure = slice(None) if model == TINY else slice(8)  # a recording has close calls
    assert tokens(replies)[sure] == tokens(plain)[sure]
    for with_drafts, without in zip(replies[sure], plain):
        assert np.allclose(scores(with_drafts), scores(without), atol=TOLERANCE, rtol=0)
    assert replies[4]["meta_info"]["spec_draft_token_num"] == 0, "penalties count each token before the next"
    assert all("spec_verify_ct" not in reply["meta_info"] for reply in plain)
    return replies


def without_speculation(flags: dict[str, Any]) -> dict[str, Any]:
    """On one device, with room for all."""
    return {name: value for name, value in flags.items() if name == "skip_tokenizer_init"}


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


@ways
def test_cached_pages_hold_only_accepted_tokens(engine, way):
    """A conversation goes on from pages in which drafts were right and wrong."""
    fast = engine(way.model, **way.flags)
    [first] = ask(fast, [way.row(40)])
    assert 0 < first["meta_info"]["spec_accept_token_num"] < first["meta_info"]["spec_draft_token_num"]
    following = [greedy([*way.prompt, *first["output_ids"], 3, 4], 20)]
    [again] = ask(fast, following)
    assert again["meta_info"]["cached_tokens"] >= 48
    assert tokens([again]) == tokens(ask(engine(way.model, **without_speculation(way.flags)), following))


@ways
def test_client_that_leaves_amid_drafts_costs_nothing(engine, way):
    fast = engine(way.model, **way.flags)
    stream = fast.generate(
        input_ids=PROMPT, sampling_params={"max_new_tokens": 400, "logit_bias": ALWAYS}, stream=True
    )
    assert len(next(stream)["output_ids"]) >= 1
    stream.close()
    assert tokens(ask(fast, [greedy(PROMPT, 5, logit_bias=ALWAYS)])) == [[9] * 5]


@pytest.mark.parametrize("flags", [NGRAM, NEXTN], ids=["NGRAM", "NEXTN"])
def test_stop_strings_and_samples_of_a_text_are_those_without_speculation(engine, flags):
    text = "The list is sorted in place. The list is sorted in place. The list is sorted in"
    asked = {"temperature": 0, "max_new_tokens": 60, "ignore_eos": True}
    options = {"skip_tokenizer_init": False}
    plain, fast = engine(TINY, **options), engine(TINY, **flags | options)
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


@ways
def test_engine_counts_drafts_and_those_accepted(engine, way):
    fast = engine(way.model, **way.flags)
    before = fast.stats()
    [reply] = ask(fast, [way.row(30)])
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


def test_trained_layer_guesses_most_tokens_of_held_out_text(engine):
    rows = [greedy(HELD_OUT[at : at + 100], 80) for at in range(0, 4000, 1000)]
    meta = [reply["meta_info"] for reply in ask(engine(TINY, **NEXTN), rows)]
    drafted = sum(m["spec_draft_token_num"] for m in meta)
    accepted = sum(m["spec_accept_token_num"] for m in meta)
    assert drafted > 100 and accepted > 0.6 * drafted  # 145 of 168 when it was trained
