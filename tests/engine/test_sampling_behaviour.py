"""What sampling parameters do to the tokens of the whole engine, judged by logits computed apart from it."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.engine import batch, slot_state
from jaxserve.messages import Generate, Logprobs, Sampling
from tests.engine.asking import NOISE, Golden, Row, ask, check_greedy, greedy, raw, tokens
from tests.models.tiny import Chunk, TinyEngine, load_tiny

EOS = 2  # of the recorded configurations
GOLDEN = Golden.read("llama")
PROMPT = GOLDEN.prompts[2].tolist()
CHOSEN = GOLDEN.greedy[2].tolist()
TOLERANCE = 1e-4  # of logits, see test_families.py
ROUNDING = 1e-6  # of one logprob computed in two ways: logits to 20, float32 keeps 1e-7 of them


@pytest.fixture(scope="module")
def logits_of():
    """Logits [T, V] of a sequence, from the model without the engine around it."""
    bare = TinyEngine(load_tiny("llama"))

    def compute(sequence):
        (logits,) = bare.step([[]], [[Chunk(0, 0, np.array(sequence))]], R=0, P=176)
        return logits[: len(sequence)]

    return compute


def check_choices(logits_TV, prompt, outputs, adjust) -> None:
    """Each output is the largest of the adjusted logits; those too close to call are passed over."""
    sure = 0
    for i, token in enumerate(outputs):
        logits_V = adjust(logits_TV[len(prompt) - 1 + i].astype(np.float64), outputs[:i])
        second, first = np.sort(logits_V)[-2:]
        if first - second > 3 * NOISE:  # penalties up to 3 enlarge a difference
            assert token == logits_V.argmax(), f"output {i}"
            sure += 1
    assert sure > len(outputs) // 2


# ---- penalties ----


@pytest.mark.parametrize(
    "penalties",
    [
        {"frequency_penalty": 1.5},
        {"frequency_penalty": -1.0},
        {"presence_penalty": 2.0},
        {"repetition_penalty": 2.0},
        {"repetition_penalty": 0.5},
        {"frequency_penalty": 0.8, "presence_penalty": -0.5, "repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_penalties_subtract_and_divide_by_what_was_said(engine, logits_of, penalties):
    prompt = PROMPT[:20] + [7, 8, 9] * 4
    got = tokens(ask(engine(), [greedy(prompt, 60, **penalties)] * 6))  # more than there are slots
    assert all(outputs == got[0] for outputs in got)
    assert got[0] != tokens(ask(engine(), [greedy(prompt, 60)]))[0], "the penalty changed nothing"

    def adjust(logits_V, said):
        count_V = np.bincount(said, minlength=len(logits_V))
        seen_V = (count_V > 0) | np.isin(np.arange(len(logits_V)), prompt)
        divisor = penalties.get("repetition_penalty", 1.0)
        logits_V = np.where(seen_V, np.where(logits_V > 0, logits_V / divisor, logits_V * divisor), logits_V)
        logits_V -= penalties.get("frequency_penalty", 0.0) * count_V
        return logits_V - penalties.get("presence_penalty", 0.0) * (count_V > 0)

    check_choices(logits_of(prompt + got[0]), prompt, got[0], adjust)


@pytest.mark.parametrize(
    "extreme, same",
    [
        ({"repetition_penalty": 1e-320, "temperature": 0}, {"repetition_penalty": 1e-7, "temperature": 0}),
        ({"temperature": 1e308, "min_p": 1.0}, {"temperature": 1e20, "min_p": 1.0}),
        ({"temperature": 1e308, "top_p": 1e-320}, {"temperature": 1e20, "top_p": 1e-6}),
    ],
    ids=str,
)
def test_value_beyond_float32_acts_as_the_most_extreme_one_within(engine, extreme, same):
    params = {"max_new_tokens": 12, "ignore_eos": True, "sampling_seed": 4}
    got, want = tokens(ask(engine(), [Row(PROMPT, params | extreme), Row(PROMPT, params | same)]))
    assert got == want


def test_slot_forgets_penalties_and_biases_of_its_last_request(engine):
    """Each slot is used by a heavily biased request; then plain ones run in the program that has biases."""
    heavy = greedy(PROMPT, 8, logit_bias={"9": 100.0}, repetition_penalty=2.0, min_new_tokens=4)
    plain = [
        greedy(PROMPT),
        greedy(PROMPT, min_new_tokens=20),  # nothing can stop it, so nothing is barred
        greedy(PROMPT, presence_penalty=0.0, top_k=7),
    ]
    neighbour = Row(PROMPT[:5], {"max_new_tokens": 40, "ignore_eos": True, "top_k": 3, "sampling_seed": 1})
    small = engine()
    assert tokens(ask(small, [heavy] * 4)) == [[9] * 8] * 4
    replies = ask(small, [neighbour, *plain])
    part = Golden([], [], np.repeat(GOLDEN.greedy[2:3], 3, 0), np.repeat(GOLDEN.margin[2:3], 3, 0))
    check_greedy(part, replies[1:])


# ---- biases and stops ----


def test_banned_tokens_never_come(engine, logits_of):
    banned = sorted(set(CHOSEN))
    [outputs] = tokens(ask(engine(), [greedy(PROMPT, logit_bias={str(t): -100.0 for t in banned})]))
    assert not set(outputs) & set(banned)

    def adjust(logits_V, said):
        logits_V[banned] -= 100
        return logits_V

    check_choices(logits_of(PROMPT + outputs), PROMPT, outputs, adjust)


def test_forced_token_always_comes(engine):
    assert tokens(ask(engine(), [greedy(PROMPT, 9, logit_bias={"77": 100.0})])) == [[77] * 9]


def test_bias_steers_a_random_row_too(engine):
    row = Row(PROMPT, {"max_new_tokens": 9, "logit_bias": {"77": 100.0}, "ignore_eos": True})
    assert tokens(ask(engine(), [row])) == [[77] * 9]


def test_stop_token_ends_the_output_and_is_named(engine):
    stop = CHOSEN[6]
    at = CHOSEN.index(stop)
    [reply] = ask(engine(), [greedy(PROMPT, stop_token_ids=[stop, 319])])
    assert reply["output_ids"] == CHOSEN[: at + 1]
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert reply["meta_info"]["completion_tokens"] == at + 1


@pytest.mark.parametrize("least", [1, 5, 23])
def test_min_new_tokens_bars_stops_until_then(engine, logits_of, least):
    stops = sorted(set(CHOSEN))
    params = {"stop_token_ids": stops, "min_new_tokens": least}
    [reply] = ask(engine(), [greedy(PROMPT, 40, **params)])
    outputs, reason = reply["output_ids"], reply["meta_info"]["finish_reason"]
    assert not set(outputs[:least]) & set(stops)
    if reason["type"] == "stop":
        assert len(outputs) > least and outputs[-1] == reason["matched"]

    def adjust(logits_V, said):
        if len(said) < least:
            logits_V[stops] = -np.inf
        return logits_V

    check_choices(logits_of(PROMPT + outputs), PROMPT, outputs, adjust)


def test_stop_is_allowed_right_after_min_new_tokens(engine):
    """A forced token is barred while it would stop, and comes at the first chance."""
    params = {"stop_token_ids": [77], "min_new_tokens": 6, "logit_bias": {"77": 100.0}}
    [outputs] = tokens(ask(engine(), [greedy(PROMPT, 20, **params)]))
    assert len(outputs) == 7 and outputs.index(77) == 6


def test_end_of_sequence_stops_unless_ignored(engine):
    params = {"logit_bias": {str(EOS): 100.0}}
    rows = [greedy(PROMPT, 9, ignore_eos=False, **params), greedy(PROMPT, 9, ignore_eos=True, **params)]
    stopped, ignored = ask(engine(), rows)
    assert stopped["output_ids"] == [EOS]
    assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": EOS}
    assert ignored["output_ids"] == [EOS] * 9
    assert ignored["meta_info"]["finish_reason"] == {"type": "length", "length": 9}


def test_ignoring_eos_does_not_ignore_stop_token_ids(engine):
    params = {"logit_bias": {"77": 100.0}, "stop_token_ids": [77]}
    assert tokens(ask(engine(), [greedy(PROMPT, 9, ignore_eos=True, **params)])) == [[77]]


# ---- filters that leave one token ----


@pytest.mark.parametrize(
    "alone",
    [{"top_k": 1}, {"top_p": 1e-6}, {"top_p": 1e-320}, {"min_p": 1.0}, {"temperature": 1e-7}],
    ids=str,
)
def test_filter_that_leaves_one_token_is_greedy(engine, alone):
    rows = [Row(PROMPT, {"max_new_tokens": 24, "ignore_eos": True, "temperature": 1.5, **alone})]
    assert tokens(ask(engine(), rows)) == [CHOSEN]


def test_top_k_draws_among_the_k_most_likely(engine, logits_of):
    rows = [Row(PROMPT, {"max_new_tokens": 1, "ignore_eos": True, "top_k": 3, "temperature": 50.0, "n": 64})]
    drawn = {outputs[0] for outputs in tokens(ask(engine(), rows))}
    assert drawn == set(np.argsort(logits_of(PROMPT)[-1])[-3:].tolist())


# ---- logprobs ----


def test_logprobs_of_the_whole_vocabulary_sum_to_one(engine, logits_of):
    parts = [list(range(at, at + 32)) for at in range(0, 320, 32)]
    replies = ask(
        engine(), [greedy(PROMPT, 1)] * 10,
        return_logprob=True, logprob_start_len=len(PROMPT) - 1, token_ids_logprob=parts, top_logprobs_num=20,
    )  # fmt: skip
    metas = [reply["meta_info"] for reply in replies]
    logprob_V = np.array([value for m in metas for value, _, _ in m["output_token_ids_logprobs"][0]])
    ids = [token for m in metas for _, token, _ in m["output_token_ids_logprobs"][0]]
    assert ids == list(range(320))
    np.testing.assert_allclose(np.exp(logprob_V).sum(), 1, atol=1e-5)  # 320 float32 roundings of 1e-7
    reference_V = logits_of(PROMPT)[-1]
    reference_V = reference_V - np.log(np.exp(reference_V - reference_V.max()).sum()) - reference_V.max()
    np.testing.assert_allclose(logprob_V, reference_V, atol=TOLERANCE)

    top = metas[0]["output_top_logprobs"][0]
    assert [token for _, token, _ in top] == np.argsort(-logprob_V)[:20].tolist()
    [[value, token, _]] = metas[0]["output_token_logprobs"]
    assert token == CHOSEN[0] and abs(value - top[0][0]) < ROUNDING
    # The last prompt token, scored beside them, has its own entries.
    assert [t for _, t, _ in metas[3]["input_token_ids_logprobs"][0]] == parts[3]
    assert len(metas[3]["input_top_logprobs"]) == 1


@pytest.mark.parametrize("count", [0, 1, 20])
def test_as_many_top_logprobs_come_as_were_asked_for(engine, count):
    [reply] = ask(
        engine(), [greedy(PROMPT, 3)], return_logprob=True, logprob_start_len=30, top_logprobs_num=count
    )
    meta = reply["meta_info"]
    if count == 0:
        assert "output_top_logprobs" not in meta
        return
    assert [len(top) for top in meta["output_top_logprobs"]] == [count] * 3
    assert [len(top) for top in meta["input_top_logprobs"]] == [count] * 3
    for (value, token, _), top in zip(meta["output_token_logprobs"], meta["output_top_logprobs"]):
        assert top[0][1] == token and abs(top[0][0] - value) < ROUNDING


def test_logprobs_are_the_models_own_whatever_the_sampling(engine):
    """Temperature, penalties and biases choose the token; its logprob does not know of them."""
    hot = {"temperature": 2.0, "logit_bias": {str(t): 100.0 for t in CHOSEN[:1]}, "presence_penalty": 1.0}
    rows = [greedy(PROMPT, 1), Row(PROMPT, {"max_new_tokens": 1, "ignore_eos": True, **hot})]
    plain, biased = ask(engine(), rows, return_logprob=True)
    [[a, token, _]] = plain["meta_info"]["output_token_logprobs"]
    [[b, other, _]] = biased["meta_info"]["output_token_logprobs"]
    assert token == other and abs(a - b) < TOLERANCE


def test_score_of_a_prompt_needs_no_output(engine):
    [reply] = ask(engine(), [greedy(PROMPT, 0)], return_logprob=True, logprob_start_len=0)
    assert reply["output_ids"] == []
    assert len(reply["meta_info"]["input_token_logprobs"]) == len(PROMPT)
    assert reply["meta_info"]["finish_reason"] == {"type": "length", "length": 0}


def test_prompt_logprobs_come_with_the_first_output_only(engine):
    request = Generate(
        rid="scored", input_ids=PROMPT, sampling=Sampling(max_new_tokens=4), return_logprob=True,
        logprob_start_len=len(PROMPT) - 2,
    )  # fmt: skip
    [outputs] = raw(engine(), request)
    assert [isinstance(o.prompt_logprobs, Logprobs) for o in outputs] == [True, False, False, False]
    assert len(outputs[0].prompt_logprobs.values) == 2
    assert [o.queue_time_s is not None for o in outputs] == [True, False, False, False]


# ---- what the engine refuses ----

LIMIT = 512  # the recorded models' context, below the pool's 1024 tokens


@pytest.mark.parametrize(
    "fields, sampling, message",
    [
        ({"input_ids": []}, {}, "input_ids is empty"),
        ({"input_ids": [5] * 512}, {}, "the prompt has 512 tokens; this server takes at most 511"),
        (
            {"input_ids": [5] * 500}, {"max_new_tokens": 13},
            "prompt (500 tokens) plus max_new_tokens (13) exceed the limit of 512 tokens",
        ),
        ({}, {"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"input_ids": [5, 320]}, {}, "token id 320 is outside the vocabulary of 320"),
        ({"input_ids": [-1]}, {}, "token id -1 is outside the vocabulary of 320"),
        ({}, {"logit_bias": {400: 1.0}}, "token id 400 is outside the vocabulary of 320"),
        ({"token_ids_logprob": (7, 999)}, {}, "token id 999 is outside the vocabulary of 320"),
        (
            {}, {"logit_bias": {t: 1.0 for t in range(320)}, "stop_token_ids": tuple(range(65))},
            "logit_bias and stop_token_ids have more than 384 entries together",
        ),
        ({"top_logprobs_num": 21}, {}, "top_logprobs_num=21 must lie in 0..20"),
        ({"top_logprobs_num": -1}, {}, "top_logprobs_num=-1 must lie in 0..20"),
        ({"token_ids_logprob": tuple(range(33))}, {}, "token_ids_logprob has more than 32 entries"),
        ({"dp_rank": 1}, {}, "routed_dp_rank=1 must lie in 0..0"),
        ({"dp_rank": -1}, {}, "routed_dp_rank=-1 must lie in 0..0"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)  # fmt: skip
def test_request_the_engine_cannot_take_is_refused_with_a_reason(engine, fields, sampling, message):
    bad = Generate(**{"rid": "bad", "input_ids": [5], "sampling": Sampling(**sampling), **fields})
    good = Generate(rid="good", input_ids=PROMPT, sampling=Sampling(max_new_tokens=2, temperature=0.0))
    [refused], served = raw(engine(), bad, good)
    assert (refused.finish.type, refused.finish.status_code) == ("abort", 400)
    assert refused.finish.message == message
    assert refused.token_ids == []
    assert [t for output in served for t in output.token_ids] == CHOSEN[:2], "a neighbour was harmed"


def test_request_that_just_fits_is_served(engine):
    longest = Generate(
        rid="longest", input_ids=[5] * (LIMIT - 1), sampling=Sampling(max_new_tokens=1, temperature=0.0)
    )
    roomy = Generate(rid="roomy", input_ids=[5], sampling=Sampling(max_new_tokens=LIMIT - 1, temperature=0.0))
    outputs = raw(engine(), longest, roomy)
    assert [len([t for o in row for t in o.token_ids]) for row in outputs] == [1, LIMIT - 1]
    assert [row[-1].finish.type for row in outputs] == ["length", "length"]


def test_most_biases_and_stops_fit_together(engine):
    bias = {t: 5.0 for t in range(300)}
    sampling = Sampling(
        max_new_tokens=3, min_new_tokens=2, temperature=0.0, logit_bias=bias,
        stop_token_ids=tuple(range(236, 320)),
    )  # fmt: skip
    [outputs] = raw(engine(), Generate(rid="full", input_ids=PROMPT, sampling=sampling))
    got = [t for output in outputs for t in output.token_ids]
    assert max(got[:2]) < 236, "a barred stop came"


def test_counts_of_a_token_end_at_what_16_bits_hold():
    """A step later, and after a request came back with an output of that token alone."""
    most = slot_state.LARGEST_COUNT
    count = jnp.array([[most - 1, most, 5]], jnp.int16)
    for token in (0, 0, 1, 2):
        count = slot_state.count_rows(count, jnp.array([0, -1]), jnp.array([token, token]))
    assert count.tolist() == [[most, most, 6]]
    packed = np.full((1, batch.PREPARE_PACKING.length), -1, np.int32)
    f = batch.PREPARE_PACKING.views(packed[0])
    f["slot"][:], f["first"][:], f["output"][:] = 0, 0, 2
    bias = jnp.zeros((1, batch.NUM_BIASES), jnp.int32)
    slots = {
        "output_count": count.at[0, 2].set(most - 9),
        "in_prompt": jnp.zeros((1, 3), bool),
        "bias_id": bias,
        "bias_value": bias.astype(jnp.float32),
    }
    slots = slot_state._prepare_rank(slots, packed)
    assert slots["output_count"].dtype == jnp.int16
    assert slots["output_count"].tolist() == [[most, most, most]]
