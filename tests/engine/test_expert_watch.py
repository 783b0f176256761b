"""What the experts have to do: counted, recorded on demand, and evened out between steps."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxserve.engine.expert_watch import ExpertWatch
from jaxserve.layers.moe import ExpertSpec
from jaxserve.messages import EngineRefusal
from jaxserve.parallel.placement import Placement
from tests.models.test_fp8 import FP8, is_quantised, quantise
from tests.models.tiny import Golden, read_config, read_tensors

GREEDY = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
BALANCED = {
    "tp": 4, "ep": 4, "moe_a2a_backend": "all_to_all",
    "enable_eplb": True, "ep_num_redundant_experts": 4, "eplb_rebalance_num_iterations": 5,
}  # fmt: skip


def call(served, method):
    return served._run(served._connection.call(method))


def ask(served):
    prompts = [prompt.tolist() for prompt in Golden.read("mixtral").prompts]
    return served.generate(input_ids=prompts, sampling_params=GREEDY)


def test_record_counts_what_came_between_start_and_stop(engine):
    served = engine("mixtral")
    ask(served)
    served.flush_cache()
    call(served, "start_expert_record")
    ask(served)
    during = call(served, "dump_expert_record")
    call(served, "stop_expert_record")
    ask(served)
    stopped = call(served, "dump_expert_record")
    assert (during["recording"], stopped["recording"]) == (True, False)
    assert stopped["logical_count"] == during["logical_count"]
    computed = sum(len(prompt) + 23 for prompt in Golden.read("mixtral").prompts)
    extra = len(Golden.read("mixtral").prompts)  # a step already launched when a request ended
    for row in stopped["logical_count"]:  # two layers, two choices a token
        assert 2 * computed <= sum(row) <= 2 * (computed + extra)
    assert stopped["physical_to_logical_map"] == [list(range(8))] * 2
    call(served, "start_expert_record")
    assert np.sum(call(served, "dump_expert_record")["logical_count"]) == 0
    with pytest.raises(EngineRefusal, match="no expert distribution record runs; start one"):
        call(served, "stop_expert_record")
        call(served, "stop_expert_record")


def test_dense_model_has_no_record(engine):
    for verb in ("start", "stop", "dump"):
        with pytest.raises(EngineRefusal, match="this model has no experts"):
            call(engine("llama"), f"{verb}_expert_record")
    assert "experts" not in engine("llama").stats()


def test_every_slot_holds_the_expert_that_the_table_says_after_many_moves(engine):
    """Each expert's weights are the checkpoint's own, wherever they went, and so are their tables."""
    served = engine("mixtral", **BALANCED)
    runner = served._engine.runner
    state = runner.experts
    numbers = state.balancing.weights
    first = [[np.asarray(runner._leaves[n]) for n in layer] for layer in numbers]
    before = state.placement
    for _ in range(2):
        ask(served)
        served.flush_cache()
    stats, placement = served.stats(), state.placement
    assert stats["experts"]["moved"] > 0
    assert stats["compiles_after_ready"] == 0
    for layer, logical in enumerate(placement.logical_LP):
        held = [before.copies(layer, 8)[expert][0] for expert in logical]
        for number, array in zip(numbers[layer], first[layer]):
            np.testing.assert_array_equal(np.asarray(runner._leaves[number]), array[held])
    for table, want in zip(state.slots, placement.table(8)):
        np.testing.assert_array_equal(np.asarray(table), want)


def test_tokens_of_devices_sum_to_all_choices(engine):
    served = engine("mixtral", **BALANCED)
    ask(served)
    experts = served.stats()["experts"]
    assert len(experts["device_tokens"]) == 4
    assert sum(experts["device_tokens"]) == pytest.approx(served._engine.runner.expert_load().sum(), abs=4)
    assert len(experts["balancedness"]) == 2 and all(0 < b <= 1 for b in experts["balancedness"])
    served.flush_cache()


class FakeRunner:
    """An engine's runner as far as a watch knows it: counters are given, moves are written down."""

    def __init__(self, state):
        self.experts, self.load, self.moved = state, None, []

    def expert_load(self):
        return self.load

    def move_experts(self, layers):
        self.moved.append(sorted(layers))
        for layer, logical_P in layers.items():
            self.experts.placement = self.experts.placement.with_layer(layer, logical_P)


class FakeState:
    def __init__(self, placement, num_steps, layers_at_once):
        self.placement = placement
        self.spec = ExpertSpec(len(placement.logical_LP), 4, 2)
        self.balancing = type("Balancing", (), {"num_steps": num_steps, "layers_at_once": layers_at_once})


def test_record_that_was_never_started_is_refused():
    watch = ExpertWatch(FakeRunner(FakeState(Placement.trivial(1, 4, 4, 2), 1, 1)))
    for method in (watch.stop_record, watch.dump_record):
        with pytest.raises(ValueError, match="no expert distribution record"):
            method()


def test_layers_move_a_few_a_step_and_those_that_gain_nothing_stay():
    runner = FakeRunner(FakeState(Placement.trivial(4, 4, 6, 2), num_steps=3, layers_at_once=2))
    skewed, even = [1, 1, 90, 1], [10, 10, 5, 5]  # experts 0 and 1 have two slots each at first
    runner.load = np.array([skewed, even, [0, 0, 0, 0], [1, 1, 1, 90]], np.uint64)
    watch = ExpertWatch(runner)
    for _ in range(6):
        watch.before_steps(1)
    assert runner.moved == [[], [], [], [0], [3], []]
    assert (watch.num_rebalances, watch.num_moved > 0) == (1, True)
    runner.load = runner.load * 2  # a second window like the first: all is well as it is
    for _ in range(3):
        watch.before_steps(1)
    assert watch.num_rebalances == 2 and runner.moved[6:] == [[], [], []]


def test_steps_of_one_launch_count_each():
    runner = FakeRunner(FakeState(Placement.trivial(1, 4, 6, 2), num_steps=8, layers_at_once=1))
    runner.load = np.array([[1, 1, 90, 1]], np.uint64)
    watch = ExpertWatch(runner)
    for begun in (0, 0, 1, 1, 2):
        watch.before_steps(4)
        assert watch.num_rebalances == begun


def test_experts_in_float8_move_with_their_scales(engine, tmp_path):
    """Against the same file on one device; in two halves as well, as a production server would run."""
    stored = {}
    for name, tensor in read_tensors("deepseek_v3").items():
        stored[name] = tensor
        if is_quantised(name, tensor):
            stored[name], stored[f"{name}_scale_inv"] = quantise(tensor)
    save_file(stored, tmp_path / "model.safetensors")
    config = {**read_config("deepseek_v3"), "quantization_config": FP8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    moving = {**BALANCED, "dp_size": 2, "enable_dp_attention": True, "enable_two_batch_overlap": True}
    prompts = [prompt.tolist() for prompt in Golden.read("deepseek_v3").prompts]
    plain, moved = (
        engine(str(tmp_path), **options).generate(input_ids=prompts, sampling_params=GREEDY)
        for options in ({}, moving)
    )
    assert [reply["output_ids"] for reply in moved] == [reply["output_ids"] for reply in plain]
    assert engine(str(tmp_path), **moving).stats()["experts"]["moved"] > 0
