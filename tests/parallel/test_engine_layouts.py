"""Whole engines on virtual devices, every family on every layout with every backend: greedy tokens are
the recorded ones, answers with penalties, seeds, stops and logprobs those of one device, and every
token's choice of experts is counted.

All of it: scripts/test tests/parallel/test_engine_layouts.py --slow (docs/layouts.md has the last run).
"""

import contextlib
import json
import re

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from jaxserve.config import ConfigError, ServerConfig
from jaxserve.engine.blueprint import draw
from jaxserve.parallel.dispatch import choose_backend
from tests.engine.asking import Row, ask, check_greedy
from tests.models.tiny import FAMILIES, HYBRID_FAMILIES, MOE_FAMILIES, Golden, read_config

GREEDY = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}


def dpa(dp):
    return {"dp_size": dp, "enable_dp_attention": True}


LAYOUTS = {
    "tp1": {},
    "tp2": {"tp": 2},
    "dpa2": {"tp": 2, **dpa(2)},
    "dpa4": {"tp": 4, **dpa(4)},
    "dpa8": {"tp": 8, **dpa(8)},
    "ep2": {"tp": 2, "ep": 2},
    "ep4": {"tp": 4, "ep": 4},
    "ep8": {"tp": 8, "ep": 8},
    "dpa8-ep8": {"tp": 8, "ep": 8, **dpa(8)},
    "tp4-dpa2": {"tp": 4, **dpa(2)},
    "tp4-ep2": {"tp": 4, "ep": 2},
    "tp4-dpa2-ep2": {"tp": 4, "ep": 2, **dpa(2)},
    "tp8-dpa2-ep4": {"tp": 8, "ep": 4, **dpa(2)},
    "tp8-dpa4-ep8": {"tp": 8, "ep": 8, **dpa(4)},
}
BACKENDS = ("allgather", "all_to_all", "ragged", None)


def has_ep(layout):
    return LAYOUTS[layout].get("ep", 1) > 1


def cells(families):
    """A list for each family: every layout that it can have, with every backend where there are several."""
    for family in families:
        layouts = [name for name in LAYOUTS if family in MOE_FAMILIES or not has_ep(name)]
        yield [(family, name, b) for name in layouts for b in (BACKENDS if has_ep(name) else (None,))]


def sample(by_family, every):
    """A fixed part: of each family one cell in `every`, from another one on, so that layouts take turns."""
    return [cell for number, cells in enumerate(by_family) for cell in cells[number % every :: every]]


ALL = [cell for family in cells((*FAMILIES, *MOE_FAMILIES)) for cell in family]
FAST = [*sample(cells(FAMILIES), 2), *sample(cells(MOE_FAMILIES), 10)]
BALANCED = [cell for cell in ALL if has_ep(cell[1])]
FAST_BALANCED = BALANCED[::101]
# Steps of a model with recurrent states cannot be halved; test_check.py sees that refused.
HALVED = [cell for cell in ALL if LAYOUTS[cell[1]].get("tp", 1) > 1 and cell[0] not in HYBRID_FAMILIES]
FAST_HALVED = HALVED[::114]


def name(cell):
    return "-".join(str(part) for part in cell if part)


def marked(cell, fast=FAST):
    return pytest.param(*cell, id=name(cell), marks=() if cell in fast else pytest.mark.slow)


def test_sample_of_sixty_cells_covers_every_family_and_every_layout_with_every_backend():
    assert len(set(FAST)) == len(FAST) >= 60
    assert {family for family, _, _ in FAST} == {*FAMILIES, *MOE_FAMILIES}
    assert {cell[1:] for cell in FAST} == {cell[1:] for cell in ALL}
    assert len({cell[1:] for cell in ALL}) == 6 + 8 * 4  # layouts without experts over devices, and with


def test_sample_of_cells_in_two_halves_covers_every_backend():
    assert {backend for _, _, backend in FAST_HALVED} == set(BACKENDS)


def test_sample_of_balanced_cells_covers_every_backend_and_size():
    assert {backend for _, _, backend in FAST_BALANCED} == set(BACKENDS)
    assert {LAYOUTS[layout]["ep"] for _, layout, _ in FAST_BALANCED} == {2, 4, 8}


def num_choices(family):
    """Experts that a token chooses in one layer."""
    return read_config(family)["num_experts_per_tok"]


@pytest.mark.parametrize("family, layout, backend", [marked(cell) for cell in ALL])
def test_answers_are_those_of_one_device_and_all_choices_of_experts_are_counted(
    engine, family, layout, backend
):
    golden = Golden.read(family)
    wanted = of_one_device(engine, family)  # first: making an engine may close those made before
    served = engine(family, **LAYOUTS[layout], **({"moe_a2a_backend": backend} if backend else {}))
    with counted_choices(served, family) as computed:
        for _ in range(2):  # the second time from the cache
            replies = served.generate(input_ids=[p.tolist() for p in golden.prompts], sampling_params=GREEDY)
            check_greedy(golden, replies)
            computed += replies
    compare(ask(served, mixed(golden), **SCORED), wanted)
    served.flush_cache()


@contextlib.contextmanager
def counted_choices(served, family):
    """Takes replies, of 24 tokens each: their tokens' choices are what the load counters grow by."""
    replies: list[dict] = []
    if family not in MOE_FAMILIES:
        yield replies
        return
    runner = served._engine.runner
    before = runner.expert_load().copy()
    yield replies
    facts = [reply["meta_info"] for reply in replies]
    # The last sampled token of a request is never computed.
    computed = sum(f["prompt_tokens"] + 23 - f["cached_tokens"] for f in facts)
    per_layer = (runner.expert_load() - before).sum(axis=1)
    # A step already launched when a request ended computes one token more of it.
    assert (per_layer >= computed * num_choices(family)).all()
    assert (per_layer <= (computed + len(replies)) * num_choices(family)).all()


# Every mix of sixteen devices, on models that divide: Kimi-K2 has 16 experts, DeepSeek-V3 an FFN of 16.
SIXTEEN = [
    pytest.param("kimi_k2" if ep > 1 else "deepseek_v3", dp, ep, id=f"tp16-dpa{dp}-ep{ep}")
    for dp in (2, 4, 8, 16)
    for ep in (1, *(e for e in (2, 4, 8, 16) if e % dp == 0))
]


@pytest.mark.slow
@pytest.mark.parametrize("family, dp, ep", SIXTEEN)
def test_greedy_tokens_are_the_recorded_ones_on_sixteen_devices(engine, family, dp, ep):
    if jax.device_count() < 16:
        pytest.skip("runs under --devices 16")
    golden = Golden.read(family)
    for backend in BACKENDS if ep > 1 else (None,):
        chosen = {"moe_a2a_backend": backend} if backend else {}
        served = engine(family, tp=16, ep=ep, **dpa(dp), **chosen)
        for _ in range(2):  # the second time from the cache
            prompts = [p.tolist() for p in golden.prompts]
            check_greedy(golden, served.generate(input_ids=prompts, sampling_params=GREEDY))


SCORED = {"return_logprob": True, "top_logprobs_num": 3}
ONE_DEVICE: dict[str, list] = {}  # the family's answers, computed once


def of_one_device(engine, family):
    if family not in ONE_DEVICE:
        ONE_DEVICE[family] = ask(engine(family), mixed(Golden.read(family)), **SCORED)
    return ONE_DEVICE[family]


def mixed(golden):
    """Rows that each need another part of the sample programs, two samples of each."""
    stop = int(golden.greedy[1][7])
    spices = [
        {"temperature": 0, "repetition_penalty": 1.4},
        {"temperature": 0, "frequency_penalty": 0.7, "presence_penalty": 0.3, "logit_bias": {"7": 3.0}},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "sampling_seed": 6},
        {"temperature": 1.0, "sampling_seed": 5},
        {"temperature": 0, "stop_token_ids": [stop]},
    ]
    prompt = golden.prompts[1].tolist()
    return [Row(prompt, {"max_new_tokens": 12, "ignore_eos": True, "n": 2, **spice}) for spice in spices]


def compare(replies, wanted):
    """Tokens are equal; logprobs up to sums of float32 in another order (see tests/models)."""
    assert [reply["output_ids"] for reply in replies] == [want["output_ids"] for want in wanted]
    for reply, want in zip(replies, wanted):
        got, want = reply["meta_info"], want["meta_info"]
        assert got["finish_reason"] == want["finish_reason"]
        for name in ("output_token_logprobs", "output_top_logprobs"):
            got_values, want_values = (np.array(flatten(facts[name]), np.float64) for facts in (got, want))
            np.testing.assert_allclose(got_values, want_values, rtol=0, atol=1e-4)


def flatten(entries):
    """The logprobs of [logprob, token id, text] entries, or of lists of such."""
    return [x for e in entries for x in ([e[0]] if not isinstance(e[0], list | tuple) else flatten(e))]


@pytest.mark.parametrize("family, layout, backend", [marked(cell, FAST_BALANCED) for cell in BALANCED])
def test_experts_that_move_during_generation_give_the_same_tokens(engine, family, layout, backend):
    golden, options = Golden.read(family), LAYOUTS[layout]
    served = engine(
        family,
        **options,
        **({"moe_a2a_backend": backend} if backend else {}),
        enable_eplb=True,
        ep_num_redundant_experts=options["ep"] if options["ep"] > 2 else 0,
        eplb_rebalance_num_iterations=5,
    )
    prompts = [prompt.tolist() for prompt in golden.prompts]
    before = served.stats()["experts"]
    replies = served.generate(input_ids=prompts, sampling_params=GREEDY)
    assert [list(reply["output_ids"]) for reply in replies] == golden.greedy.tolist()
    after = served.stats()["experts"]
    assert after["rebalances"] - before["rebalances"] >= 4
    assert after["moved"] > before["moved"]
    served.flush_cache()


@pytest.mark.parametrize("family, layout, backend", [marked(cell, FAST_HALVED) for cell in HALVED])
def test_steps_in_two_halves_give_the_same_tokens(engine, family, layout, backend):
    golden = Golden.read(family)
    chosen = {"moe_a2a_backend": backend} if backend else {}
    served = engine(family, **LAYOUTS[layout], **chosen, enable_two_batch_overlap=True)
    runner = served._engine.runner
    pool = ",".join(map(str, runner._key_pages.sharding.shard_shape(runner._key_pages.shape)))
    for bucket in runner.buckets:  # the second half writes where the first one has read
        assert not re.search(rf"\[{pool}\]\S* copy\(", runner.hlo(bucket))
    before = runner.expert_load().sum() if family in MOE_FAMILIES else 0
    prompts = [prompt.tolist() for prompt in golden.prompts]
    replies = served.generate(input_ids=prompts, sampling_params=GREEDY)
    assert [list(reply["output_ids"]) for reply in replies] == golden.greedy.tolist()
    if family in MOE_FAMILIES:
        computed = sum(len(p) + 23 - r["meta_info"]["cached_tokens"] for p, r in zip(prompts, replies))
        a_token = runner.experts.spec.num_layers * num_choices(family)
        load = runner.expert_load().sum() - before
        assert computed * a_token <= load <= (computed + len(prompts)) * a_token
    served.flush_cache()


def test_ep_on_a_dense_model_is_refused(engine):
    with pytest.raises(ConfigError, match="ep=2: this model has no experts; use ep 1"):
        engine("llama", tp=2, ep=2)


def test_ep_that_does_not_divide_the_experts_is_refused_with_valid_ones(tmp_path, engine):
    config = {**read_config("mixtral"), "num_local_experts": 6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"6 experts do not divide over ep=4; use ep 1, 2$"):
        engine(str(tmp_path), tp=4, ep=4, load_format="dummy")


def test_names_of_other_runtimes_are_mapped_with_a_log_line(caplog):
    with caplog.at_level("INFO"):
        assert choose_backend("deepep", ep=8) == "all_to_all"
        assert choose_backend("none", ep=8) == "allgather"
        assert choose_backend("deepep", ep=1) == "none"
    assert [r.message for r in caplog.records] == [
        "moe_a2a_backend=deepep means all_to_all here",
        "moe_a2a_backend=none with ep=8 means allgather",
        "moe_a2a_backend=deepep needs ep > 1; at ep 1 every device has all experts: none",
    ]
    assert choose_backend(None, ep=8) == "auto"
    assert choose_backend(None, ep=1) == "none"


def test_load_counters_survive_wrapping_at_32_bits(engine):
    runner = engine("mixtral")._engine.runner
    total = runner.expert_load().copy()
    experts = runner.experts
    experts._seen = np.full_like(experts._seen, 2**32 - 3)
    experts.load = experts.load * 0 + 4  # wrapped: 7 more than was seen
    assert (runner.expert_load() - total == 7).all()


def test_guides_command_for_deepseek_is_accepted_and_its_names_are_mapped(caplog):
    config = ServerConfig.from_command_line(
        [
            "--model-path",
            "M",
            "--tp",
            "8",
            "--dp-size",
            "8",
            "--ep",
            "8",
            "--enable-dp-attention",
            "--moe-a2a-backend",
            "deepep",
            "--moe-runner-backend",
            "deep_gemm",
        ]
    )
    mesh = AbstractMesh((8, 1, 1), ("dp", "ep", "tp"))
    with caplog.at_level("INFO"):
        blueprint = draw(config, read_config("deepseek_v3"), mesh, on_cpu=True)
    assert (blueprint.layout.shape, blueprint.expert_backend) == ((8, 1, 1), "all_to_all")
    messages = [record.message for record in caplog.records]
    assert "moe_a2a_backend=deepep means all_to_all here" in messages
    assert "moe_runner_backend=deep_gemm: experts run in this engine's grouped GEMM" in messages
