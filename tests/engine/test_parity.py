"""The whole engine against the recorded reference: same tokens, however a request is served.

Greedy tokens are compared with the recording; seeded random ones with what the same engine gives
when the request is alone. A draw could only change where a rounding difference of about 1e-6 in a
probability meets the drawn number; the seeds here do not.
"""

import numpy as np
import pytest

from jaxserve.messages import Generate, Sampling
from tests.engine.asking import (
    FAMILIES,
    NOISE,
    Golden,
    Row,
    ask,
    check_greedy,
    golden_rows,
    greedy,
    raw,
    tokens,
)

TIGHT = {"max_total_tokens": 160}  # ten pages
TOLERANCE = 1e-4  # of logits, see test_families.py
CUT = ("llama", "gemma3")  # of full and of mixed windowed attention; the others only add compile time

# Each needs another part of the sample programs.
SPICES = [
    {"temperature": 1.0, "sampling_seed": 5},
    {"temperature": 0.7, "top_k": 20, "sampling_seed": 6},
    {"temperature": 1.3, "top_p": 0.8, "min_p": 0.02, "sampling_seed": 7},
    {"temperature": 0.9, "frequency_penalty": 0.7, "presence_penalty": 0.3, "sampling_seed": 8},
    {"temperature": 0, "repetition_penalty": 1.4},
    {"temperature": 0, "logit_bias": {"7": 3.0, "9": -50.0}},
]


def crowd(seed: int = 0, count: int = 10) -> list[Row]:
    """Strangers of mixed lengths and kinds."""
    rng = np.random.default_rng(seed)
    return [
        Row(
            rng.integers(3, 320, rng.integers(1, 90)).tolist(),
            {"max_new_tokens": int(rng.integers(1, 40)), "ignore_eos": True, **SPICES[i % len(SPICES)]},
        )
        for i in range(count)
    ]


def log_softmax(logits_TV):
    shifted = logits_TV - logits_TV.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def retractions(replies) -> int:
    return sum(reply["meta_info"]["num_retractions"] for reply in replies)


@pytest.fixture
def no_headroom(monkeypatch):
    """Admission keeps nothing free for growth, so that requests must be taken back."""
    monkeypatch.setattr("jaxserve.engine.rank.GROWTH_TOKENS", 0)


def ask_pressed(tight, row: Row, **fields):
    """The reply to a row that runs beside a request with all other pages, which soon needs one more."""
    tight.flush_cache()
    pages = 10 - -(-len(row.prompt) // 16)
    neighbour = greedy([5 + i % 7 for i in range(16 * pages - 2)], 16)
    fields = {name: [default, fields[name]] for name, default in UNSCORED.items() if name in fields}
    return ask(tight, [neighbour, row], **fields)[1]


UNSCORED = {"return_logprob": False, "logprob_start_len": -1}


@pytest.fixture(scope="module", params=FAMILIES)  # so that a family's tests follow each other
def family(request):
    return request.param


@pytest.fixture
def golden(family):
    return Golden.read(family)


# ---- greedy ----


def test_greedy_tokens_are_the_recorded_ones_alone_and_again_from_the_cache(engine, family, golden):
    small = engine(family)
    small.flush_cache()
    for row, cached in zip(golden_rows(golden), (0, 0, 32, 112)):
        first, second = ask(small, [row]), ask(small, [row])
        index = [len(p) for p in golden.prompts].index(len(row.prompt))
        assert first[0]["output_ids"] == second[0]["output_ids"]
        assert first[0]["output_ids"] == golden.greedy[index].tolist()
        assert first[0]["meta_info"]["cached_tokens"] == 0
        assert second[0]["meta_info"]["cached_tokens"] == cached


def test_greedy_tokens_are_the_recorded_ones_without_a_radix_cache(engine, family, golden):
    bare = engine(family, disable_radix_cache=True)
    for _ in range(2):
        replies = ask(bare, golden_rows(golden))
        check_greedy(golden, replies)
        assert [reply["meta_info"]["cached_tokens"] for reply in replies] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    "options", [{"chunked_prefill_size": 16}, {"chunked_prefill_size": 128, "page_size": 4}]
)
def test_greedy_tokens_do_not_depend_on_chunk_and_page_size(engine, family, golden, options):
    other = engine(family, **options)
    for _ in range(2):
        check_greedy(golden, ask(other, golden_rows(golden)))


def test_greedy_tokens_are_the_recorded_ones_in_a_crowd(engine, family, golden):
    small = engine(family)
    small.flush_cache()
    for seed in range(2):  # the second crowd finds the golden prompts cached
        strangers = crowd(seed)
        replies = ask(small, [*strangers[:5], *golden_rows(golden), *strangers[5:]])
        check_greedy(golden, replies[5:9])


def test_greedy_tokens_are_the_recorded_ones_after_retraction(engine, family, golden, no_headroom):
    tight = engine(family, **TIGHT)
    rows = golden_rows(golden)
    replies = [ask_pressed(tight, row) for row in rows]
    check_greedy(golden, replies)
    assert [retractions([reply]) for reply in replies] == [1, 1, 1, 1]


def test_every_sample_of_a_greedy_prompt_is_the_recorded_continuation(engine, family, golden):
    rows = [Row(row.prompt, {**row.params, "n": 3}) for row in golden_rows(golden)]
    replies = ask(engine(family), rows)
    assert len(replies) == 12
    for sample in range(3):
        check_greedy(golden, replies[sample::3])


@pytest.mark.parametrize("spice", [{}, {"top_k": 5}, {"return_logprob": True}, {"presence_penalty": 0.5}])
def test_greedy_row_gets_its_tokens_from_every_sample_program(engine, golden, family, spice):
    """Alone it takes the greedy program; a neighbour's wishes make it the random, full or logprob one."""
    fields = {"return_logprob": [False, spice.pop("return_logprob", False)]}
    neighbour = Row([40, 41, 42], {"max_new_tokens": 30, "ignore_eos": True, "sampling_seed": 1, **spice})
    replies = ask(engine(family), [golden_rows(golden)[2], neighbour], **fields)
    part = Golden(golden.prompts[2:3], [], golden.greedy[2:3], golden.margin[2:3])
    check_greedy(part, replies[:1])


# ---- logprobs ----


@pytest.mark.parametrize("cached", [False, True], ids=["cold", "cached"])
@pytest.mark.parametrize("start", [0, 1, 15, 16, 17, 31, 32, 119])
def test_prompt_logprobs_are_the_recorded_ones_from_any_start(engine, start, cached):
    golden, small = Golden.read("llama"), engine("llama")
    small.flush_cache()
    prompt = golden.prompts[3].tolist()
    if cached:
        ask(small, [greedy(prompt)])
    [reply] = ask(small, [greedy(prompt, 4)], return_logprob=True, logprob_start_len=start)
    got = reply["meta_info"]["input_token_logprobs"]
    assert [token for _, token, _ in got] == prompt[start:]
    check_prompt_logprobs(golden, 3, got, start)


def check_prompt_logprobs(golden, row, got, start=0, tolerance=TOLERANCE):
    logprob_TV, prompt = log_softmax(golden.logits[row]), golden.prompts[row]
    want = [None] * (start == 0) + [logprob_TV[t - 1, prompt[t]] for t in range(max(start, 1), len(prompt))]
    values = [value for value, _, _ in got]
    assert len(values) == len(want)
    assert (values[:1] == [None]) == (start == 0)
    np.testing.assert_allclose(values[start == 0 :], want[start == 0 :], rtol=0, atol=tolerance)


def test_logprobs_of_prompt_and_first_token_are_the_recorded_ones(engine, family, golden):
    small = engine(family)
    for _ in range(2):  # scored prompts are not taken from the cache
        replies = ask(small, golden_rows(golden), return_logprob=True, logprob_start_len=0)
        check_greedy(golden, replies)
        for row, reply in enumerate(replies):
            meta = reply["meta_info"]
            check_prompt_logprobs(golden, row, meta["input_token_logprobs"])
            first, token, _ = meta["output_token_logprobs"][0]
            assert abs(first - log_softmax(golden.logits[row])[-1, token]) < TOLERANCE


# Logits reach 20 here, of which 11 bits keep 0.005 and 8 bits 0.04; several roundings add up.
@pytest.mark.parametrize("dtype, tolerance", [("float16", 0.05), ("bfloat16", 0.4)])
def test_logprobs_in_half_the_bits_are_near_the_recorded_ones(engine, dtype, tolerance):
    golden, half = Golden.read("llama"), engine("llama", dtype=dtype)
    assert (half.info.dtype, half.info.kv_cache_dtype) == (dtype, dtype)
    for row, reply in enumerate(ask(half, golden_rows(golden), return_logprob=True, logprob_start_len=0)):
        got = reply["meta_info"]["input_token_logprobs"]
        check_prompt_logprobs(golden, row, got, tolerance=tolerance)


@pytest.mark.parametrize("family", CUT)
def test_prompt_retracted_between_its_chunks_is_scored_once(engine, family, golden, no_headroom):
    tight = engine(family, **TIGHT, chunked_prefill_size=16)
    [row] = golden_rows(golden)[3:]
    reply = ask_pressed(tight, row, return_logprob=True, logprob_start_len=0)
    assert retractions([reply]) == 1
    check_prompt_logprobs(golden, 3, reply["meta_info"]["input_token_logprobs"])


# ---- seeded random ----


def seeded(golden: Golden) -> list[Row]:
    """One row of each kind on the recorded prompts."""
    prompts = [golden.prompts[i % 4].tolist() for i in range(len(SPICES))]
    return [
        Row(prompt, {"max_new_tokens": 24, "ignore_eos": True, **spice})
        for prompt, spice in zip(prompts, SPICES, strict=True)
    ]


@pytest.fixture
def alone(engine, family, golden):
    """What each seeded row gives when nobody else is there and nothing is cached."""
    small = engine(family)
    out = []
    for row in seeded(golden):
        small.flush_cache()
        out += tokens(ask(small, [row]))
    return out


def test_seeded_tokens_are_the_same_from_the_cache_and_in_a_crowd(engine, family, golden, alone):
    small, rows = engine(family), seeded(golden)
    assert tokens(ask(small, rows)) == alone
    assert tokens([ask(small, [row])[0] for row in rows]) == alone
    assert tokens(ask(small, [*crowd(3, 6), *rows, *crowd(4, 6)])[6:12]) == alone


def test_seeded_tokens_are_the_same_after_retraction(engine, family, golden, alone, no_headroom):
    tight = engine(family, **TIGHT)
    replies = [ask_pressed(tight, row) for row in seeded(golden)]
    assert tokens(replies) == alone
    assert [retractions([reply]) for reply in replies] == [1] * len(SPICES)


def test_retracted_request_resumes_with_the_same_tokens_without_a_cache(engine, family, no_headroom):
    """Everything is computed again, penalties are counted again."""
    tight = engine(family, **TIGHT, disable_radix_cache=True)
    params = {"max_new_tokens": 60, "ignore_eos": True, "sampling_seed": 3, "frequency_penalty": 0.5}
    rows = [Row([30 + i] * 20, params) for i in range(3)]
    alone = tokens([ask(tight, [row])[0] for row in rows])
    replies = ask(tight, rows)
    assert retractions(replies) > 0
    assert tokens(replies) == alone


def test_samples_of_a_seeded_prompt_are_those_of_the_following_seeds(engine, family, golden):
    small, prompt = engine(family), golden.prompts[2].tolist()
    params = {"max_new_tokens": 12, "ignore_eos": True, "temperature": 1.0}
    replies = ask(small, [Row(prompt, {**params, "n": 3, "sampling_seed": 70})])
    singles = [ask(small, [Row(prompt, {**params, "sampling_seed": 70 + i})])[0] for i in range(3)]
    assert tokens(replies) == tokens(singles)
    assert len({tuple(t) for t in tokens(replies)}) == 3


@pytest.mark.parametrize("spice", [{"top_k": 5}, {"return_logprob": True}, {"temperature": 0}])
def test_seeded_row_gets_its_tokens_from_every_sample_program(engine, golden, family, spice):
    small = engine(family)
    row = Row(golden.prompts[1].tolist(), {"max_new_tokens": 24, "ignore_eos": True, "sampling_seed": 12})
    [alone] = ask(small, [row])
    fields = {"return_logprob": [False, spice.pop("return_logprob", False)]}
    neighbour = Row([40, 41, 42], {"max_new_tokens": 30, "ignore_eos": True, "sampling_seed": 1, **spice})
    beside = ask(small, [row, neighbour], **fields)[0]
    assert beside["output_ids"] == alone["output_ids"]


# ---- output made elsewhere ----


@pytest.mark.parametrize("already", [1, 7, 15, 16, 23])
@pytest.mark.parametrize("cached", [False, True], ids=["cold", "cached"])
def test_output_made_elsewhere_is_continued_with_the_same_tokens(engine, already, cached):
    golden, small = Golden.read("llama"), engine("llama")
    rows = {
        "greedy": Sampling(max_new_tokens=24, temperature=0.0),
        "seeded": Sampling(max_new_tokens=24, seed=5, top_p=0.9),
        "penalised": Sampling(max_new_tokens=24, temperature=0.0, frequency_penalty=1.5),
        "barred": Sampling(max_new_tokens=24, temperature=0.0, min_new_tokens=20, stop_token_ids=(7,)),
    }
    prompt = golden.prompts[2].tolist()
    for name, sampling in rows.items():
        small.flush_cache()
        [whole] = raw(small, Generate(rid=name, input_ids=prompt, sampling=sampling))
        want = [token for output in whole for token in output.token_ids]
        if not cached:
            small.flush_cache()
        resumed = Generate(rid=name, input_ids=prompt, output_ids=want[:already], sampling=sampling)
        neighbour = Generate(rid="n", input_ids=[5], sampling=Sampling(max_new_tokens=9, top_k=4, seed=1))
        rest, _ = raw(small, resumed, neighbour)
        assert [token for output in rest for token in output.token_ids] == want[already:], name


# ---- layouts ----

DP2 = {"tp": 2, "dp_size": 2, "enable_dp_attention": True}
DP2_TP2 = {"tp": 4, "dp_size": 2, "enable_dp_attention": True}


@pytest.mark.parametrize(
    "family, layout",
    [
        ("llama", DP2),
        ("llama", DP2_TP2),
        ("minimax_text", DP2_TP2),
    ],
    ids=lambda value: value if isinstance(value, str) else f"tp{value['tp']}dp{value.get('dp_size', 1)}",
)
def test_greedy_and_seeded_tokens_do_not_depend_on_the_layout(engine, golden, family, layout):
    wide, rows = engine(family, **layout), seeded(golden)
    want = tokens([ask(engine(family), [row])[0] for row in rows])
    for _ in range(2):
        replies = ask(wide, [*golden_rows(golden), *rows, *crowd(9, 4)])
        check_greedy(golden, replies[:4])
        assert tokens(replies[4:10]) == want
    ranks = {reply["meta_info"]["dp_rank"] for reply in replies}
    assert ranks == set(range(layout.get("dp_size", 1)))


def test_logprobs_on_two_ranks_are_the_recorded_ones(engine):
    golden, wide = Golden.read("llama"), engine("llama", **DP2_TP2)
    for rank in range(2):
        replies = ask(
            wide, golden_rows(golden), return_logprob=True, logprob_start_len=0, routed_dp_rank=rank
        )
        for row, reply in enumerate(replies):
            assert reply["meta_info"]["dp_rank"] == rank
            check_prompt_logprobs(golden, row, reply["meta_info"]["input_token_logprobs"])


def test_the_recordings_leave_nothing_too_close_to_call():
    """So that the comparisons above cover every recorded token."""
    assert all(Golden.read(family).margin.min() > NOISE for family in FAMILIES)
