"""Whole engines on virtual devices: greedy tokens of every family with experts, layout and backend
are the recorded ones of one device, and every token's choice of experts is counted."""

import json

import numpy as np
import pytest
from jax.sharding import AbstractMesh

from jaxserve.config import ConfigError, ServerConfig
from jaxserve.engine.blueprint import draw
from jaxserve.parallel.dispatch import choose_backend
from tests.models.tiny import HYBRID_FAMILIES, MOE_FAMILIES, Golden, read_config

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
BACKENDS = ("allgather", "all_to_all", None)


def cells():
    """Every family on every layout, with every backend where there is more than one."""
    for family in MOE_FAMILIES:
        for layout, options in LAYOUTS.items():
            for backend in BACKENDS if options.get("ep", 1) > 1 else (None,):
                yield family, layout, backend


def sample(all_cells, every):
    """A fixed part; the tests below say what comes up in it."""
    return [cell for number, cell in enumerate(all_cells) if number % every == 0]


ALL = list(cells())
FAST = sample(ALL, 11)
BALANCED = [cell for cell in ALL if LAYOUTS[cell[1]].get("ep", 1) > 1]
FAST_BALANCED = sample(BALANCED, 59)
# Steps of a model with recurrent states cannot be halved; test_check.py sees that refused.
HALVED = [cell for cell in ALL if LAYOUTS[cell[1]].get("tp", 1) > 1 and cell[0] not in HYBRID_FAMILIES]
FAST_HALVED = sample(HALVED, 86)


def name(cell):
    return "-".join(str(part) for part in cell if part)


def marked(cell, fast=FAST):
    return pytest.param(*cell, id=name(cell), marks=() if cell in fast else pytest.mark.slow)


def test_sample_covers_every_family_layout_and_backend():
    assert {family for family, _, _ in FAST} == set(MOE_FAMILIES)
    assert {layout for _, layout, _ in FAST} == set(LAYOUTS)
    assert {backend for _, _, backend in FAST} == set(BACKENDS)


def test_sample_of_cells_in_two_halves_covers_every_backend():
    assert {backend for _, _, backend in FAST_HALVED} == set(BACKENDS)


def test_sample_of_balanced_cells_covers_every_backend_and_size():
    assert {backend for _, _, backend in FAST_BALANCED} == set(BACKENDS)
    assert {LAYOUTS[layout]["ep"] for _, layout, _ in FAST_BALANCED} == {2, 4, 8}


def num_choices(family):
    """Experts that a token chooses in one layer."""
    return read_config(family)["num_experts_per_tok"]


@pytest.mark.parametrize("family, layout, backend", [marked(cell) for cell in ALL])
def test_greedy_tokens_are_those_of_one_device_and_all_choices_are_counted(engine, family, layout, backend):
    golden = Golden.read(family)
    served = engine(family, **LAYOUTS[layout], **({"moe_a2a_backend": backend} if backend else {}))
    runner = served._engine.runner
    before = runner.expert_load().copy()
    prompts = [prompt.tolist() for prompt in golden.prompts]
    replies = served.generate(input_ids=prompts, sampling_params=GREEDY)
    assert [list(reply["output_ids"]) for reply in replies] == golden.greedy.tolist()

    # The last sampled token of a request is never computed.
    computed = sum(len(p) + 23 - r["meta_info"]["cached_tokens"] for p, r in zip(prompts, replies))
    per_layer = (runner.expert_load() - before).sum(axis=1)
    # A step already launched when a request ended computes one token more of it.
    assert (per_layer >= computed * num_choices(family)).all()
    assert (per_layer <= (computed + len(prompts)) * num_choices(family)).all()
    served.flush_cache()


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
    before = runner.expert_load().sum()
    prompts = [prompt.tolist() for prompt in golden.prompts]
    replies = served.generate(input_ids=prompts, sampling_params=GREEDY)
    assert [list(reply["output_ids"]) for reply in replies] == golden.greedy.tolist()
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


def test_ragged_backend_is_refused_with_the_ones_there_are(engine):
    with pytest.raises(ConfigError, match=r"moe_a2a_backend='ragged' is not available.*use 'all_to_all'"):
        engine("mixtral", tp=2, ep=2, moe_a2a_backend="ragged")


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
