"""What compiled programs send between devices is what the plan forecasts: no weight, no page of KV and
no other rank's row is ever gathered."""

import pytest

from jaxserve.config import ServerConfig
from jaxserve.engine.blueprint import draw_on_paper
from jaxserve.engine.programs import FULL, GREEDY, LOGPROBS
from jaxserve.parallel.compiled import bytes_by_group, collectives
from jaxserve.roofline import Collective
from jaxserve.step_cost import StepCost
from tests.models.tiny import read_config
from tools.collectives import compare, lines, main

DPA = {"enable_dp_attention": True}
CELLS = [
    ("llama", {"tp": 4}),
    ("llama", {"tp": 4, "dp_size": 2, **DPA}),
    ("minimax_m2", {"tp": 2}),  # norms over heads that lie on several devices
    ("minimax_text", {"tp": 2}),  # and of lightning attention
    ("deepseek_v3", {"tp": 8}),
    ("deepseek_v3", {"tp": 8, "dp_size": 8, **DPA}),
    ("deepseek_v3", {"tp": 8, "dp_size": 8, "ep": 8, "moe_a2a_backend": "allgather", **DPA}),
    ("deepseek_v3", {"tp": 8, "dp_size": 8, "ep": 8, "moe_a2a_backend": "all_to_all", **DPA}),
    ("deepseek_v3", {"tp": 8, "dp_size": 2, "ep": 4, "moe_a2a_backend": "allgather", **DPA}),
    ("deepseek_v3", {"tp": 8, "dp_size": 2, "ep": 4, "moe_a2a_backend": "all_to_all", **DPA}),
    ("deepseek_v3", {"tp": 8, "dp_size": 2, "ep": 4, "moe_a2a_backend": "ragged", **DPA}),
]


def name(cell):
    family, options = cell
    return "-".join(
        [family, *(f"{key}{value}" for key, value in options.items() if key != "enable_dp_attention")]
    )


def forecast_of(family, options, on_cpu=True):
    config = ServerConfig.from_keywords(model_path=family, dtype="float32", **options)
    return StepCost(draw_on_paper(config, read_config(family), on_cpu))


@pytest.mark.parametrize("cell", CELLS, ids=name)
def test_every_step_sends_what_is_forecast_and_nothing_else(engine, cell):
    family, options = cell
    runner, cost = engine(family, **options)._engine.runner, forecast_of(family, options)
    found = compare(runner, cost)
    assert len(found) == len(runner.buckets) == 2
    assert all(one.forecast for one in found)
    assert all(one.agrees for one in found), "\n".join(lines(name(cell), cost.layout.shape, found))
    assert not collectives(runner.hlo("update_table"))
    assert not collectives(runner.hlo("prepare_slot"))


@pytest.mark.parametrize("cell", CELLS[1:3], ids=name)
def test_whoever_needs_whole_rows_of_logits_gathers_them_within_the_group_and_nothing_else(engine, cell):
    family, options = cell
    runner, layout = engine(family, **options)._engine.runner, forecast_of(family, options).layout
    vocab = read_config(family)["vocab_size"]
    bucket = runner.buckets[-1]
    samples, rows = bucket.num_samples, bucket.num_tokens
    sent = {
        "full": (collectives(runner.hlo((samples, FULL))), samples),
        "logprobs": (collectives(runner.hlo((samples, LOGPROBS))), samples),
        "prompt logprobs": (collectives(runner.hlo(("score", bucket))), rows),
    }
    for who, (found, num_rows) in sent.items():
        logits = Collective("", "all_gather", 1, layout.group, 1, num_rows * vocab * 4)
        assert bytes_by_group(found) == bytes_by_group([logits]), who
    # Of greedy rows each device's best: its logit and its id.
    best = Collective("", "all_gather", 2, layout.group, 1, samples * layout.group * 4)
    assert bytes_by_group(collectives(runner.hlo((samples, GREEDY)))) == bytes_by_group([best])


# ---- reading a program ----

HLO = """HloModule jit_f, num_partitions=8

%branch_0 (p: f32[4]) -> f32[4] {
  %all-gather = f32[8]{0} all-gather(%p), replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}
}

%branch_1 (p: f32[4]) -> f32[4] {
  ROOT %a = (bf16[2,8]{1,0}, /*index=1*/bf16[2,8]) all-to-all(%x), replica_groups=mesh['dp'=2,'tp'=4] {'dp'}
}

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %r = f32[4]{0} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%add, metadata={op_name="jit(f)/sum"}
}

%still (p: (s32[])) -> (s32[]) {
  %q = s32[] add(%p, %p)
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]{0}) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %v = (s32[]) while(%t), condition=%c, body=%still
  %c.1 = f32[4]{0} conditional(%i, %x, %x), branch_computations={%branch_0, %branch_1}
  %s = (f32[2,4]{1,0}, f32[16,4]{1,0}) all-gather-start(%x), replica_groups={}, dimensions={0}
  %d = f32[16,4]{1,0} all-gather-done(%s)
  %z = f32[8]{0} reduce-scatter(%x), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
  %o = f32[8]{0} all-reduce(%x), replica_groups=mesh['dp'=8,'tp'=1] {'tp'}, to_apply=%add
  ROOT %p.1 = u8[6]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
}
"""


def test_loops_count_by_their_turns_and_conditionals_by_their_branch_of_a_true_predicate():
    assert collectives(HLO) == [
        Collective("jit(f)/sum", "all_reduce", 3, 4, 1, 16),
        Collective("", "all_to_all", 1, 2, 4, 2 * 2 * 8 * 2),
        Collective("", "all_gather", 1, 8, 1, 16 * 4 * 4),
        Collective("", "reduce_scatter", 1, 2, 4, 2 * 8 * 4),
        Collective("", "permute", 1, 2, 1, 6),
    ]


def test_predicates_branches_are_named():
    named = HLO.replace(
        "branch_computations={%branch_0, %branch_1}",
        "true_computation=%branch_1, false_computation=%branch_0",
    )
    assert collectives(named) == collectives(HLO)


def test_collective_that_nothing_known_calls_is_not_left_out():
    with pytest.raises(AssertionError, match="in computations that nothing known calls: body"):
        collectives(HLO.replace("condition=%c, body=%body", "condition=%body, body=%still"))


def test_loop_of_unknown_length_that_sends_is_not_counted_wrongly():
    with pytest.raises(AssertionError, match="a loop of unknown length sends"):
        collectives(HLO.replace('"known_trip_count":{"n":"3"}', ""))


def test_gathered_head_would_be_noticed():
    head = "%g = f32[320,64]{1,0} all-gather(%h), replica_groups=[2,4]<=[8], dimensions={0}\n  %v = "
    assert bytes_by_group(collectives(HLO.replace("%v = ", head)))["all_gather", 4, 1] == 320 * 64 * 4 * 3 / 4


# What sends in a decode step of tests/golden/deepseek_v3, compiled by jaxlib 0.11.2 for four H100s (8 rows
# a rank, float32, tp 4, dp 2), without attributes that say nothing of it; four equal sums call one body.
GPU_HLO = """HloModule jit_forward, is_scheduled=true, num_partitions=4

%fused_all-reduce.1.0.clone (param_0.366: f32[8,32]) -> f32[8,32] {
  %param_0.366 = f32[8,32]{1,0} parameter(0)
  ROOT %all-reduce.1.2 = f32[8,32]{1,0} all-reduce(%param_0.366), replica_groups=[2,2]<=[4], to_apply=%add
}

%fused_psum.8.0.clone (param_0.374: f32[8,32]) -> f32[8,32] {
  %param_0.374 = f32[8,32]{1,0} parameter(0)
  ROOT %psum.8.2 = f32[8,32]{1,0} all-reduce(%param_0.374), replica_groups=mesh['dp'=2,'ep'=1,'tp'=2] {'tp'}
}

%wrapped_add_computation (param_0.376: f32[8,32], param_1.318: f32[8,32]) -> f32[8,32] {
  ROOT %add.8 = f32[8,32]{1,0} add(%param_0.376, %param_1.318)
}

ENTRY %main.27_spmd (param.46: f32[24,32]) -> f32[8,32] {
  %fusion-start = ((f32[8,32]{1,0}), f32[8,32]{1,0}) fusion-start(%b), calls=%fused_all-reduce.1.0.clone
  %fusion-done = f32[8,32]{1,0} fusion-done(%fusion-start)
  %fusion-start.1 = ((f32[8,32]{1,0}), f32[8,32]{1,0}) fusion-start(%g), calls=%fused_all-reduce.1.0.clone
  %fusion-start.2 = ((f32[8,32]{1,0}), f32[8,32]{1,0}) fusion-start(%g), calls=%fused_all-reduce.1.0.clone
  %fusion-start.3 = ((f32[8,32]{1,0}), f32[8,32]{1,0}) fusion-start(%g), calls=%fused_all-reduce.1.0.clone
  %all-gather.2 = (f32[16,2]{1,0}, f32[16,32]{1,0}, s32[16,2]{1,0}) all-gather(%weight, %hidden, %id), \
replica_groups=mesh['dp'=2,'ep'=1,'tp'=2] {'dp'}, dimensions={0}
  %reduce-scatter-start = ((f32[16,32]{1,0}), f32[8,32]{1,0}) reduce-scatter-start(%loop_reduce_fusion.2), \
replica_groups=mesh['dp'=2,'ep'=1,'tp'=2] {'dp'}, dimensions={0}, to_apply=%region_15.22
  %reduce-scatter-done = f32[8,32]{1,0} reduce-scatter-done(%reduce-scatter-start)
  %wrapped_add = f32[8,32]{1,0} fusion(%reduce-scatter-done, %g), kind=kLoop, calls=%wrapped_add_computation
  %fusion-start.4 = ((f32[8,32]{1,0}), f32[8,32]{1,0}) fusion-start(%wrapped_add), calls=%fused_psum.8.0.clone
  ROOT %fusion-done.4 = f32[8,32]{1,0} fusion-done(%fusion-start.4)
}
"""


def test_gpu_program_sends_what_is_forecast_for_gpus():
    row = 32 * 4
    a_sum = Collective("", "all_reduce", 1, 2, 1, 8 * row)
    sent = collectives(GPU_HLO)
    assert sent == [
        *[a_sum] * 4,
        Collective("", "all_gather", 1, 2, 2, 16 * (row + 2 * 8)),  # two choices of an id and a weight
        Collective("", "reduce_scatter", 1, 2, 2, 16 * row),
        a_sum,
    ]
    cost = forecast_of("deepseek_v3", {"tp": 4, "dp_size": 2, **DPA}, on_cpu=False)
    of_forward = [c for c in cost.collectives(8, 8) if c.name != "draws"]
    assert bytes_by_group(sent) == bytes_by_group(of_forward)


@pytest.mark.parametrize(
    "started, kind, payload",
    [
        ("((f32[64,8]{1,0}), f32[16,8]{1,0}) reduce-scatter-start", "reduce_scatter", 4 * 16 * 8 * 4),
        ("((bf16[64,8]{1,0}), bf16[64,8]{1,0}) all-to-all-start", "all_to_all", 64 * 8 * 2),
        ("((f32[144]{0}), f32[144]{0}) all-reduce-start", "all_reduce", 144 * 4),
        ("((f32[8]{0}), f32[8]{0}, s32[]) all-reduce-start", "all_reduce", 8 * 4),
        (
            "((f32[8,2]{1,0}, s32[8,2]{1,0}), (f32[32,2]{1,0}, s32[32,2]{1,0})) all-gather-start",
            "all_gather",
            2 * 32 * 2 * 4,
        ),
        # Opcodes of their own, as jaxlib had them for GPUs before, and has for other devices.
        ("f32[8]{0} all-reduce-start", "all_reduce", 8 * 4),
        ("(f32[8]{0}, /*index=1*/bf16[2]{0}) all-reduce-start", "all_reduce", 8 * 4 + 2 * 2),
        ("(f32[8]{0}, f32[32]{0}) all-gather-start", "all_gather", 32 * 4),
    ],
)
def test_start_of_a_collective_counts_its_result_and_not_its_operands(started, kind, payload):
    sent = collectives(program(f"{started}(%x), replica_groups=[1,4]<=[4], to_apply=%add"))
    assert sent == [Collective("", kind, 1, 4, 1, payload)]


@pytest.mark.parametrize(
    "started",
    [
        "((f32[8]{0}), f32[8]{0}) collective-permute-start",
        "(f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start",
    ],
)
def test_start_of_a_permute_counts_its_result(started):
    sent = collectives(program(f"{started}(%x), source_target_pairs={{{{0,1}},{{1,2}},{{2,3}},{{3,0}}}}"))
    assert sent == [Collective("", "permute", 1, 2, 1, 8 * 4)]


@pytest.mark.parametrize(
    "groups, size, stride",
    [
        ("mesh['a'=2,'b'=8] {'a'}", 2, 8),
        ("mesh['a'=2,'b'=8] {'b'}", 8, 1),
        ("mesh['a'=2,'b'=8] {'a','b'}", 16, 1),
        ("mesh['a'=2,'b'=8] {'b':(2)4}", 4, 1),
        ("mesh['a'=2,'b'=8] {'b':(1)2}", 2, 4),
        ("mesh['a'=2,'b'=8] {'b':(2)2,'a'}", 4, 8),
        ("[4,4]<=[4,4]T(1,0)", 4, 4),
    ],
)
def test_groups_of_a_mesh_and_of_its_parts(groups, size, stride):
    [sent] = collectives(program(f"f32[8]{{0}} all-reduce(%x), replica_groups={groups}, to_apply=%add"))
    assert (sent.size, sent.stride) == (size, stride)


def test_groups_that_are_not_understood_are_not_guessed():
    groups = "mesh['a'=4], device_ids=(3,2,1,0) {'a'}"
    with pytest.raises(AssertionError, match="no replica groups in: "):
        collectives(program(f"f32[8]{{0}} all-reduce(%x), replica_groups={groups}, to_apply=%add"))


def program(instruction):
    """With one instruction."""
    return (
        f"HloModule m, num_partitions=4\n\nENTRY %main (x: f32[8]) -> f32[8] {{\n  %i = {instruction}\n}}\n"
    )


def test_ragged_exchange_is_forecast_to_send_rows_with_a_token_alone_where_xla_can():
    options = {"tp": 8, "dp_size": 8, "ep": 8, "moe_a2a_backend": "ragged", **DPA}

    def rows(on_cpu):
        [sent] = [
            c
            for c in forecast_of("deepseek_v3", options, on_cpu).collectives(64, 64)
            if c.name == "results back"
        ]
        return sent.payload / 4 / read_config("deepseek_v3")["hidden_size"]

    choices = read_config("deepseek_v3")["num_experts_per_tok"]
    assert rows(on_cpu=True) == 8 * 64  # room for each token at each device
    assert rows(on_cpu=False) == pytest.approx(8 * 64 * (1 - (7 / 8) ** choices))


def test_wrong_layout_ends_the_command_with_status_2(capsys):
    assert main(["--model", "tests/golden/llama", "--compare", "xx"]) == 2
    assert "use tp, dpa, dpaN, ep, epN" in capsys.readouterr().err
