"""Layouts on several GPUs give one GPU's answers: greedy tokens and their logprobs, over real links."""

import functools

import jax
import numpy as np
import pytest

import jaxserve
from tests.engine.asking import check_greedy
from tests.models.tiny import GOLDEN, Golden

pytestmark = pytest.mark.gpu

BACKENDS = ("allgather", "all_to_all", "ragged")
DENSE, SPARSE, HYBRID = "llama", ("qwen3_moe", "deepseek_v3", "gpt_oss"), "minimax_text"
# Summing over devices rounds otherwise than one device does, in float32; seen: under 2e-4.
LOGPROB_ATOL = 1e-3


def dpa(count):
    return {"tp": count, "dp_size": count, "enable_dp_attention": True}


def cells(count):
    """(family, layout) on `count` devices."""
    for family in (DENSE, *SPARSE, HYBRID):
        yield family, {"tp": count}
    for family in (DENSE, SPARSE[0]):  # XLA makes all collectives
        yield family, {"tp": count, "disable_custom_all_reduce": True}
    for family in (DENSE, *SPARSE):
        yield family, dpa(count)
    for family in SPARSE:
        for backend in BACKENDS:
            yield family, {"tp": count, "ep": count, "moe_a2a_backend": backend}
            yield family, dpa(count) | {"ep": count, "moe_a2a_backend": backend}


def answers(family, rounds=1, **layout):
    """Replies to the recorded prompts, asked `rounds` times: first without a cache, then with."""
    prompts = [prompt.tolist() for prompt in Golden.read(family).prompts]
    params = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
    with jaxserve.Engine(
        model_path=str(GOLDEN / family), dtype="float32", device="cuda", skip_tokenizer_init=True,
        max_total_tokens=4096, max_running_requests=8, chunked_prefill_size=64, **layout,
    ) as engine:  # fmt: skip
        replies = [
            engine.generate(input_ids=prompts, sampling_params=params, return_logprob=True)
            for _ in range(rounds)
        ]
        assert engine.stats()["compiles_after_ready"] == 0
        by_xla = layout.get("tp", 1) == 1 or layout.get("disable_custom_all_reduce", False)
        assert by_xla or engine._engine.runner._links, "GPUs of one host exchange small arrays themselves"
    return replies


@functools.cache
def of_one_gpu(family):
    [replies] = answers(family)
    return replies


@pytest.mark.parametrize(
    "family, layout",
    [
        pytest.param(family, layout, id="-".join([family, *(f"{k}={v}" for k, v in layout.items())]))
        for count in (2, 4, 8)
        for family, layout in cells(count)
    ],
)
def test_answers_are_those_of_one_gpu(family, layout):
    if len(jax.devices()) < layout["tp"]:  # this also starts the backend with every GPU, not an engine's
        pytest.skip(f"needs {layout['tp']} GPUs")
    one = of_one_gpu(family)
    for replies in answers(family, rounds=2, **layout):
        check_greedy(Golden.read(family), replies)
        for reply, alone in zip(replies, one, strict=True):
            same = reply["output_ids"] == alone["output_ids"]
            if same:  # otherwise two choices were too close to call, which check_greedy judges
                got, want = (r["meta_info"]["output_token_logprobs"] for r in (reply, alone))
                values = [[entry[0] for entry in entries] for entries in (got, want)]
                np.testing.assert_allclose(*values, rtol=0, atol=LOGPROB_ATOL)
