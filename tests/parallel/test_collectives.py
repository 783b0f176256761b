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
    ("deepseek_v3", {"tp": 8}),
    ("deepseek_v3", {"tp": 8, "dp_size": 8, **DPA}),
    ("deepseek_v3", {"tp": 8, "dp_size": 8, "ep": 8, "moe_a2a_backend": "allgather", **DPA}),
    ("deepseek_v3", {"tp": 8, "dp_size": 8, "ep": 8, "moe_a2a_backend": "all_to_all", **DPA}),
    ("deepseek_v3", {"tp": 8, "dp_size": 2, "ep": 4, "moe_a2a_backend": "allgather", **DPA}),
    ("deepseek_v3", {"tp": 8, "dp_size": 2, "ep": 4, "moe_a2a_backend": "all_to_all", **DPA}),
]


def name(cell):
    family, options = cell
    return "-".join(
        [family, *(f"{key}{value}" for key, value in options.items() if key != "enable_dp_attention")]
    )


def forecast_of(family, options):
    config = ServerConfig.from_keywords(model_path=family, dtype="float32", **options)
    return StepCost(draw_on_paper(config, read_config(family), on_cpu=True))


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
    samples, rows = bucket.num_samples, bucket.prefill_tokens
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
  %all-gather = f32[64,32]{1,0} all-gather(%p), replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}
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


def test_loops_count_by_their_turns_and_conditionals_by_their_cheaper_branch():
    assert collectives(HLO) == [
        Collective("jit(f)/sum", "all_reduce", 3, 4, 1, 16),
        Collective("", "all_to_all", 1, 2, 4, 2 * 2 * 8 * 2),
        Collective("", "all_gather", 1, 8, 1, 16 * 4 * 4),
        Collective("", "reduce_scatter", 1, 2, 4, 2 * 8 * 4),
        Collective("", "permute", 1, 2, 1, 6),
    ]


def test_loop_of_unknown_length_that_sends_is_not_counted_wrongly():
    with pytest.raises(AssertionError, match="a loop of unknown length sends"):
        collectives(HLO.replace('"known_trip_count":{"n":"3"}', ""))


def test_gathered_head_would_be_noticed():
    head = "%g = f32[320,64]{1,0} all-gather(%h), replica_groups=[2,4]<=[8], dimensions={0}\n  %v = "
    assert bytes_by_group(collectives(HLO.replace("%v = ", head)))["all_gather", 4, 1] == 320 * 64 * 4 * 3 / 4


def test_wrong_layout_ends_the_command_with_status_2(capsys):
    assert main(["--model", "tests/golden/llama", "--compare", "xx"]) == 2
    assert "use tp, dpa, dpaN, ep, epN" in capsys.readouterr().err
