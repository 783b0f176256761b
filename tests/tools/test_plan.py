"""Planning on paper, held to hand calculations and to what was measured on one GPU."""

import functools
from pathlib import Path

import pytest

from jaxserve.config import ConfigError, ServerConfig
from jaxserve.engine.blueprint import draw_on_paper
from jaxserve.roofline import (
    DEVICES,
    Assumptions,
    Collective,
    Work,
    destinations_reached,
    experts_touched,
)
from jaxserve.step_cost import StepCost
from tests.models.tiny import read_config
from tools.plan import Refused, Row, Setting, collectives, main, parse_layout, plan, report

SHAPES = Path(__file__).parents[2] / "tools" / "shapes"
ASSUMED = Assumptions()
H100, H200 = DEVICES["h100"], DEVICES["h200"]


def setting(device=H100, devices=8, **changes):
    values = {"context": 4096, "prompt": 2048, "chunk": 2048, "assumed": ASSUMED, **changes}
    return Setting(device=device, num_devices=devices, devices_per_node=min(8, devices), **values)


def rows(name, given, *layouts):
    return [row(name, given, layout) for layout in layouts]


@functools.cache  # a second for DeepSeek-V3, which several tests ask about
def row(name, given, layout):
    (made,) = plan(str(SHAPES / f"{name}.json"), [layout], given)
    return made


def only(name, given, layout):
    made = row(name, given, layout)
    assert isinstance(made, Row), made
    return made


def cost(family, on_cpu=False, **options):
    config = ServerConfig.from_keywords(model_path=family, **options)
    return StepCost(draw_on_paper(config, read_config(family), on_cpu))


# ---- against measurements on one H100 (Llama-3.1-8B, bfloat16) ----


def test_decode_floor_is_that_of_the_measured_step():
    """A probe of a decode step with 64 rows and 934 tokens of context on average (16-token pages filled
    up to 1,024) has its floor at 7.62 ms: every weight but the embedding, and KV, once at 3.0 TB/s. It
    took 8.74 ms."""
    floor_ms = (
        only("llama-3.1-8b", setting(devices=1, context=934), "tp").decode(64).seconds(H100, ASSUMED, 1) * 1e3
    )
    assert floor_ms == pytest.approx(7.62, rel=0.005)
    assert floor_ms / 8.74 == pytest.approx(0.871, abs=0.005)


@pytest.mark.parametrize(
    "batch, floor_ms, measured_ms",
    [(1, 5.0, 6.09), (8, 5.1, 6.20), (32, 5.4, 7.28), (64, 5.8, 8.19), (256, 8.0, 15.11)],
)
def test_no_measured_decode_step_beats_the_floor(batch, floor_ms, measured_ms):
    """docs/performance.md, 128 tokens in and 256 out: a context of 256 on average. Its floor counts bytes
    alone; at 256 rows the products take longer than reading their weights."""
    row = only("llama-3.1-8b", setting(devices=1, context=256), "tp")
    step = row.decode(batch)
    assert step.num_bytes / 3.0e12 * 1e3 == pytest.approx(floor_ms, abs=0.2)
    floor = step.seconds(H100, ASSUMED, 1) * 1e3
    assert floor_ms - 0.2 < floor < measured_ms


def test_no_measured_prefill_beats_the_floor():
    """40,837 tokens/s is vLLM's best on this card, 16 prompts of 4,096."""
    row = only("llama-3.1-8b", setting(devices=1, prompt=4096), "tp")
    assert 1.0 < row.prefill_tokens_per_s / 37_780 < 1.1  # one prompt of 4,096, measured
    fast = setting(devices=1, prompt=4096, assumed=ASSUMED.changed(["prefill_attention_fraction=0.4"]))
    assert only("llama-3.1-8b", fast, "tp").prefill_tokens_per_s > 40_837  # with cuDNN's attention


# ---- DeepSeek-V3 ----


def test_deepseek_v3_keeps_eight_times_the_kv_at_dp_8():
    tp, dpa = rows("deepseek-v3", setting(H200), "tp", "dpa8")
    assert dpa.tokens_a_gib / tp.tokens_a_gib == pytest.approx(8.0)
    # 61 layers x (512 + 64) numbers of two bytes, on each of 8 devices or on one of them.
    assert tp.cost.kv_bytes_of_token == dpa.cost.kv_bytes_of_token == 61 * 576 * 2
    # Not eight times in all: each rank has all attention weights, so fewer bytes are left for KV.
    assert dpa.kv_tokens / tp.kv_tokens == pytest.approx(5.17, abs=0.01)


def test_report_says_what_part_of_the_claimed_speed_up_is_explained():
    given = setting(H200)
    text = "\n".join(report("m", rows("deepseek-v3", given, "tp", "dpa", "dpa+ep"), given))
    assert "8.00x for each GiB of KV (a token's KV is kept tp 8 times, dpa+ep 1 times)" in text
    assert "5.17x in all: 94.9 instead of 79.4 GiB a device go to weights" in text
    assert '"Up to 5x"' in text and "explain 2.16x in decode for dpa, 29% of the gain" in text
    assert "4.15x, 79% of the gain, with MLA kernels at 0.66" in text
    for name in ("bandwidth_fraction", "latent_attention_fraction", "exchange_latency_s", "nothing overlaps"):
        assert name in text


def test_causes_of_the_speed_up_multiply_to_all_of_it():
    tp, dpa = rows("deepseek-v3", setting(H200), "tp", "dpa")
    same_batch = dpa.tokens_per_s(tp.max_batch) / tp.tokens_per_s(tp.max_batch)
    larger = dpa.tokens_per_s(dpa.max_batch) / dpa.tokens_per_s(tp.max_batch)
    total = dpa.tokens_per_s(dpa.max_batch) / tp.tokens_per_s(tp.max_batch)
    assert same_batch * larger == pytest.approx(total)
    assert same_batch == pytest.approx(0.97, abs=0.01) and larger > 2


def test_deepseek_v3_does_not_fit_eight_80_gb_devices():
    (refused,) = rows("deepseek-v3", setting(H100), "tp")
    assert isinstance(refused, Refused) and "weights take 79.4 GiB a device" in refused.reason
    two_nodes = rows("deepseek-v3", setting(H100, 16), "tp", "dpa8+ep16")
    assert all(isinstance(row, Row) for row in two_nodes)


def test_gqa_gains_no_capacity_from_dp_attention_until_kv_heads_run_out():
    tp, dpa = rows("llama-3.1-70b", setting(), "tp", "dpa2")
    assert dpa.tokens_a_gib == tp.tokens_a_gib
    tp, dpa = rows("qwen3-235b-a22b", setting(), "tp", "dpa2+ep")  # 4 KV heads over 8 devices
    assert dpa.tokens_a_gib == 2 * tp.tokens_a_gib


# ---- collectives ----


def test_deduplicated_all_to_all_moves_two_thirds_of_an_all_gather_at_eight_devices():
    assert [round(destinations_reached(8, e), 2) for e in (8, 16, 64)] == [0.66, 0.40, 0.12]


@pytest.mark.parametrize(
    "kind, sent", [("all_reduce", 1500), ("all_gather", 750), ("reduce_scatter", 750), ("all_to_all", 750)]
)
def test_ring_of_four_sends_three_quarters_of_the_payload(kind, sent):
    assert Collective("c", kind, 1, 4, 1, 1000).bytes_sent == sent


def test_collective_between_nodes_shares_the_network_of_its_devices():
    gather = Collective("c", "all_gather", 1, 16, 1, 1600)
    assert gather.num_nodes(8) == 2
    assert gather.bytes_off_node(8) == 1600 / 2 / 8  # half of it enters each node, over eight adapters
    assert Collective("c", "all_to_all", 1, 16, 1, 1600).bytes_off_node(8) == 800  # half of the destinations
    assert Collective("c", "all_gather", 1, 8, 1, 1600).bytes_off_node(8) == 0
    assert Collective("c", "all_gather", 1, 4, 4, 1600).num_nodes(8) == 2  # four devices, four apart
    seconds = gather.seconds(H100, ASSUMED, 8)
    assert seconds == pytest.approx(1500 / (450e9 * 0.75) + 30e-6)


def sent(step):
    return {c.name: (c.kind, c.count, c.size, c.payload) for c in step.collectives}


def test_tensor_parallel_dense_model_sums_twice_a_layer():
    """tests/golden/llama: 2 layers, hidden 64, vocabulary 320, float32."""
    config = read_config("llama")
    assert (config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]) == (2, 64, 320)
    row = 3 * 64 * 4  # three tokens
    assert sent(cost("llama", tp=4, dtype="float32").decode(3, 10)) == {
        "sums in the group": ("all_reduce", 4, 4, row),
        "embedding": ("all_reduce", 1, 4, row),
        "draws": ("all_gather", 3, 4, 3 * 4 * 4),  # of each device the largest logit, its weight, the token
    }


def test_rows_of_a_vocabulary_that_the_group_does_not_divide_are_gathered_whole():
    """tests/golden/llama with 317 tokens over four devices, which have 80 each."""
    config = ServerConfig.from_keywords(model_path="x", tp=4, dtype="float32", max_running_requests=8)
    blueprint = draw_on_paper(config, {**read_config("llama"), "vocab_size": 317})
    assert sent(StepCost(blueprint).decode(3, 10))["logits"] == ("all_gather", 1, 4, 3 * 320 * 4)


def by_kernel(rows, **options):
    step = cost("deepseek_v2_lite", dtype="bfloat16", max_running_requests=1 << 20, **options).decode(
        rows, 10
    )
    return {c.name for c in step.collectives if c.by_kernel}


def test_gpus_of_one_host_exchange_small_arrays_by_a_kernel():
    """tests/golden/deepseek_v2_lite: hidden 32."""
    group, ranks = {"sums in the group", "embedding", "draws"}, {"tokens to all", "results back"}
    dpa = {"tp": 8, "dp_size": 8, "enable_dp_attention": True}
    assert by_kernel(8, tp=4) >= group
    assert by_kernel(1 << 19, tp=4) == set(), "33 MB of rows and 2 MB of numbers a draw"
    assert by_kernel(8, **dpa) == ranks
    assert by_kernel(8, **dpa, ep=8, moe_a2a_backend="all_to_all") == set()
    for more in ({"disable_custom_all_reduce": True}, {"enable_two_batch_overlap": True}, {"on_cpu": True}):
        assert by_kernel(8, tp=4, **more) == set()
    assert by_kernel(8, tp=4, nnodes=2, node_rank=0, dist_init_addr="localhost:1") == set()
    a_sum = Collective("c", "all_reduce", 1, 4, 1, 1000, by_kernel=True)
    assert a_sum.seconds(H100, ASSUMED, 8) == pytest.approx(1500 / (450e9 * 0.75) + 8e-6)


def test_expert_parallel_ranks_send_tokens_to_all_or_to_some():
    """tests/golden/deepseek_v3: one of two layers has experts, 2 chosen a token; hidden 32, float32."""
    dpa = {"tp": 8, "dp_size": 8, "enable_dp_attention": True, "dtype": "float32"}
    row, routing = 32 * 4, 2 * 8
    assert sent(cost("deepseek_v3", **dpa).decode(3, 10)) == {
        "tokens to all": ("all_gather", 1, 8, 8 * 3 * (row + routing)),
        "results back": ("reduce_scatter", 1, 8, 8 * 3 * row),
    }
    some = cost("deepseek_v3", **dpa, ep=8, moe_a2a_backend="all_to_all").decode(3, 10)
    assert sent(some) == {  # room for all three tokens at each of 8 devices
        "tokens to experts": ("all_to_all", 1, 8, 8 * 3 * (row + routing)),
        "results back": ("all_to_all", 1, 8, 8 * 3 * row),
    }


MIXED = {"tp": 4, "dp_size": 2, "enable_dp_attention": True, "dtype": "float32"}


def test_attention_groups_sum_their_parts_and_the_experts():
    mixed = cost("deepseek_v3", on_cpu=True, **MIXED).decode(3, 10)
    row = 3 * 32 * 4
    # Output projections of two layers, the dense layer, and the shared expert.
    assert sent(mixed)["sums in the group"] == ("all_reduce", 4, 2, row)
    assert sent(mixed)["sums of experts"] == ("all_reduce", 1, 2, row)


def test_gpu_sums_a_shared_expert_and_the_others_at_once_unless_a_gate_lies_between():
    joined = cost("deepseek_v3", **MIXED).decode(3, 10)
    assert sent(joined)["sums in the group"] == ("all_reduce", 4, 2, 3 * 32 * 4)
    assert "sums of experts" not in sent(joined)
    gated = sent(cost("qwen2_moe", **MIXED).decode(3, 10))
    assert gated["sums of experts"][:3] == ("all_reduce", 2, 2)


def test_norm_over_the_heads_of_several_devices_sums_a_number_a_token():
    """tests/golden/minimax_text: three of four layers have lightning attention, normed over its heads."""
    step = cost("minimax_text", tp=2, dtype="float32").decode(3, 10)
    assert sent(step)["norms over heads"] == ("all_reduce", 3, 2, 3 * 4)


def test_single_device_sends_nothing():
    assert cost("deepseek_v3").decode(3, 10).collectives == ()
    assert list(collectives([])) == ["Sent by one device in a decode step at the largest batch:"]


# ---- arithmetic ----


def test_work_takes_as_long_as_the_slower_of_bytes_and_operations():
    read = Work("w", 3.35e12 * 0.896, 1).seconds(H100, ASSUMED)
    computed = Work("w", 1, 989e12 * 0.66 * 2).seconds(H100, ASSUMED)
    assert (read, computed) == (pytest.approx(1.0), pytest.approx(2.0))


def test_few_tokens_touch_few_experts():
    assert experts_touched(128, 8, 0) == 0
    assert experts_touched(128, 8, 1) == pytest.approx(8 / 128)
    assert experts_touched(128, 8, 256) > 0.999


def test_latent_attention_costs_what_the_absorbed_form_computes():
    """Two layers; 8 heads score over 16 + 8 numbers and sum latents of 16: 2 x 8 x 40 operations a pair."""
    work = cost("deepseek_v3", dtype="float32").decode(3, 10).works[1]
    assert work.flops == 2 * 3 * 10 * 2 * 8 * 40
    assert work.num_bytes == 2 * 3 * 10 * (16 + 8) * 4
    assert work.kind == "latent_attention"


def test_window_bounds_what_a_token_attends():
    config = read_config("gemma3")
    window = config["sliding_window"]
    windows = cost("gemma3").windows
    assert set(windows) == {None, window}
    long, longer = (
        cost("gemma3").decode(1, context).works[1].flops for context in (10 * window, 20 * window)
    )
    full = windows.count(None) / (10 * windows.count(None) + windows.count(window))
    assert (longer - long) / long == pytest.approx(10 * full)


# ---- the command ----


def test_layout_names_are_the_servers_keys():
    assert parse_layout("tp", 8) == {"tp": 8}
    assert parse_layout("dpa4+ep", 8) == {"tp": 8, "dp_size": 4, "enable_dp_attention": True, "ep": 8}
    assert parse_layout("ep+eplb32", 8) == {
        "tp": 8, "ep": 8, "enable_eplb": True, "ep_num_redundant_experts": 32
    }  # fmt: skip
    for wrong in ("tp4", "dp", "dpa-2", "", "tp+"):
        with pytest.raises(ConfigError, match="use tp, dpa, dpaN, ep, epN"):
            parse_layout(wrong, 8)


def test_layout_that_the_engine_refuses_is_a_row_with_its_words():
    good, bad = rows("deepseek-v3", setting(H200), "tp", "dpa4+ep2")
    assert isinstance(good, Row)
    assert bad.reason == "ep=2 is not a multiple of dp_size=4; use ep 1, 4, 8"


def test_redundant_experts_cost_kv_capacity():
    plain, spare = rows("deepseek-v3", setting(H200, 16), "dpa+ep", "dpa+ep+eplb32")
    assert isinstance(plain, Row) and isinstance(spare, Row)
    # 2 of the 32 redundant experts on each of 16 devices, in float8 with a float32 for each block.
    more_bytes = 58 * 2 * 3 * 7168 * 2048 * (1 + 4 / 128**2)
    assert plain.pool_bytes - spare.pool_bytes == more_bytes
    assert spare.kv_tokens < plain.kv_tokens


def test_command_prints_the_table(capsys):
    argv = ["--model", str(SHAPES / "deepseek-v3.json"), "--gpu", "h100", "--nodes", "2"]
    assert main([*argv, "--compare", "tp,dpa,dpa+ep", "--assume", "link_latency_s=0"]) == 0
    out = capsys.readouterr().out
    assert "on 2 x 8 h100" in out and "link_latency_s" in out
    assert [line.split()[0] for line in out.splitlines() if "1x1x16" in line or "16x1x1" in line] == [
        "tp", "dpa", "dpa+ep",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--gpu", "h300"], "gpu='h300' is unknown"),
        (["--compare", "tp,xx"], "compare='xx'"),
        (["--assume", "speed=2"], "assume='speed=2': unknown"),
        (["--assume", "gemm_fraction=0"], "must be a positive number"),
        (["--assume", "gemm_fraction=x"], "must be a positive number"),
        (["--nodes", "0"], "nodes=0 is too small"),
    ],
)
def test_wrong_arguments_end_with_status_2(argv, message, capsys):
    assert main(["--model", str(SHAPES / "llama-3.1-8b.json"), *argv]) == 2
    assert message in capsys.readouterr().err
