"""Several decode steps in one launch give the tokens of one at a time, and nothing of theirs is lost."""

from pathlib import Path

import pytest

from jaxserve.config import ServerConfig
from jaxserve.engine.blueprint import draw_on_paper, read_dummy_config
from tests.engine.asking import FAMILIES, Golden, ask, check_greedy, golden_rows, greedy, tokens
from tests.models.tiny import MOE_FAMILIES

STEPS = 5
SHAPES = Path(__file__).parents[2] / "tools" / "shapes"
LAYOUTS = {
    "tp2": ("llama", {"tp": 2}),
    "dpa2-ep2-experts-moving": (
        "deepseek_v3",
        {"tp": 2, "dp_size": 2, "ep": 2, "enable_dp_attention": True}
        | {"enable_eplb": True, "eplb_rebalance_num_iterations": 5},
    ),
    "tp4-halves": ("qwen3_moe", {"tp": 4, "ep": 2, "enable_two_batch_overlap": True}),
}


@pytest.fixture
def steps_of(engine):
    """`steps_of(family, **layout)`: an engine that launches several steps."""

    def several(family="llama", **layout):
        return engine(family, num_continuous_decode_steps=STEPS, **layout)

    return several


@pytest.fixture
def single(engine):
    """An engine that launches one at a time."""
    return engine("llama")


def launches(served, rows, **fields):
    """Replies, the steps that they took, and the launches."""
    loop = served._engine
    launch, count, before = loop.runner.launch, 0, served.stats()["steps"]

    def counted(plan):
        nonlocal count
        count += 1
        return launch(plan)

    loop.runner.launch = counted
    try:
        replies = ask(served, rows, **fields)
    finally:
        loop.runner.launch = launch
    return replies, served.stats()["steps"] - before, count


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "deepseek_v2_lite", "qwen2_moe"])
def test_greedy_tokens_are_those_of_the_reference(steps_of, family):
    assert family in (*FAMILIES, *MOE_FAMILIES)
    served = steps_of(family)
    golden = Golden.read(family)
    for _ in range(2):  # the second time from the cache
        replies, steps, count = launches(served, golden_rows(golden))
        check_greedy(golden, replies)
        assert count < steps


@pytest.mark.parametrize("layout", LAYOUTS)
def test_greedy_tokens_are_those_of_the_reference_on_a_mesh(steps_of, layout):
    family, options = LAYOUTS[layout]
    served = steps_of(family, **options)
    golden = Golden.read(family)
    replies, steps, count = launches(served, golden_rows(golden))
    check_greedy(golden, replies)
    assert count < steps
    if "enable_eplb" in options:
        assert served.stats()["experts"]["moved"] > 0


def test_crowd_of_other_lengths_and_temperatures_gets_the_tokens_of_single_steps(steps_of, single):
    served = steps_of()
    rows = [
        greedy([5 + i, 9, 30 + 7 * i, 4], new=1 + 3 * i, temperature=0.7 * (i % 3), sampling_seed=i)
        for i in range(11)
    ]
    got, steps, count = launches(served, rows)
    assert tokens(got) == tokens(ask(single, rows))
    assert count < steps


def test_stop_token_between_launches_ends_the_answer_and_its_cache_is_right(steps_of, single):
    served = steps_of()
    prompt = [9 + 13 * i % 300 for i in range(35)]
    [whole] = tokens(ask(single, [greedy(prompt, new=60)]))
    for stop in range(3, 14):
        if whole[stop] in whole[:stop]:
            continue
        row = greedy(prompt, new=60, ignore_eos=False, stop_token_ids=[whole[stop]])
        [reply] = ask(served, [row])
        assert reply["output_ids"] == whole[: stop + 1]
        assert reply["meta_info"]["finish_reason"]["type"] == "stop"
        [more] = tokens(ask(served, [greedy([*prompt, *whole[: stop + 1]], new=20)]))
        [want] = tokens(ask(single, [greedy([*prompt, *whole[: stop + 1]], new=20)]))
        assert more == want


def test_what_needs_the_host_between_steps_gets_single_ones(steps_of, single):
    served = steps_of()
    plain = greedy([5, 6, 7, 8], new=24)
    for params in ({"repetition_penalty": 1.3}, {"top_k": 5, "temperature": 1.0, "sampling_seed": 3}):
        rows = [plain, greedy([9, 10, 11], new=24, **params)]
        got, steps, count = launches(served, rows)
        assert tokens(got) == tokens(ask(single, rows))
        assert count == steps
    got, steps, count = launches(served, [plain], return_logprob=True)
    assert (tokens(got), count) == (tokens(ask(single, [plain])), steps)


def test_pages_that_run_out_are_given_step_by_step(engine):
    """Sequences outgrow the pool together: some are retracted, all get the tokens of one alone."""
    options = {"max_total_tokens": 192, "max_running_requests": 4}
    served = engine("llama", num_continuous_decode_steps=STEPS, **options)
    rows = [greedy([11 + i, 3, 40, 8 + i], new=90) for i in range(4)]
    replies = ask(served, rows)
    alone = engine("llama")
    assert tokens(replies) == [tokens(ask(alone, [row]))[0] for row in rows]
    assert sum(reply["meta_info"]["num_retractions"] for reply in replies) > 0


def test_request_that_comes_between_is_let_in_after_the_launch(steps_of, single):
    served = steps_of()
    long, short = greedy([5, 6, 7], new=100), greedy([8, 9], new=12)
    stream = served.generate(input_ids=long.prompt, sampling_params=long.params, stream=True)
    first = next(iter(stream))
    got = tokens(ask(served, [short]))
    *_, last = stream
    assert first["output_ids"] == last["output_ids"][: len(first["output_ids"])]
    assert got == tokens(ask(single, [short]))
    assert last["output_ids"] == tokens(ask(single, [long]))[0]


@pytest.mark.parametrize(
    "shape, options, steps",
    [
        ("smollm2-135m", {}, 8),
        ("llama-3.1-8b", {}, 1),
        ("llama-3.1-8b", {"tp": 2}, 3),
        ("llama-3.1-8b", {"tp": 8}, 4),
        ("smollm2-135m", {"tp": 3}, 8),
        ("llama-3.1-8b", {"num_continuous_decode_steps": 3}, 3),
        ("smollm2-135m", {"speculative_algorithm": "NGRAM"}, 1),
        ("minimax-text-01", {"tp": 8, "num_continuous_decode_steps": 4}, 1),
    ],
)
def test_steps_of_a_launch_follow_from_what_a_step_reads(shape, options, steps):
    config = ServerConfig.from_keywords(model_path=f"{SHAPES}/{shape}.json", dtype="bfloat16", **options)
    hf_config, _, _ = read_dummy_config(config.model_path)
    assert draw_on_paper(config, hf_config).decode_steps == steps
    on_cpu = steps if "num_continuous_decode_steps" in options else 1
    assert draw_on_paper(config, hf_config, on_cpu=True).decode_steps == on_cpu


def test_abort_in_the_middle_leaves_nothing(steps_of):
    served = steps_of()
    stream = served.generate(input_ids=[5, 6, 7], sampling_params=greedy([1], new=100).params, stream=True)
    next(iter(stream))
    stream.close()
    served.abort()
    while served.stats()["requests"]:
        pass
    served.flush_cache()
    assert [row["num_used_tokens"] for row in served.loads()] == [0]
