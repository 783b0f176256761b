"""A run of every program on padding, which a GPU's engine begins with, changes nothing."""

import pytest

from jaxserve.engine.runner import Runner
from tests.engine.asking import Golden, check_greedy, golden_rows, greedy
from tests.engine.asking import ask as ask_engine

ENGINES = {
    "llama": {"num_continuous_decode_steps": 5},
    "gemma3": {},
    "minimax_text": {},
    "deepseek_v3": {"tp": 2, "dp_size": 2, "ep": 2, "enable_dp_attention": True},
    "configs/tiny-deepseek": {"speculative_algorithm": "NEXTN", "context_length": 256},
}


def programs_of(runner: Runner) -> set:
    return {launch.program for launches in runner.launches.padding() for launch in launches}


@pytest.mark.parametrize("family", ENGINES)
def test_padding_runs_every_program_and_changes_no_answer(engine, family):
    served = engine(family, **ENGINES[family])
    runner = served._engine.runner
    assert programs_of(runner) == set(runner.program_keys)
    prompt = [5 + 3 * i % 90 for i in range(40)]
    ask_engine(served, [greedy(prompt, repetition_penalty=1.3)])  # something is cached, counted, and kept
    load = None if runner.experts is None else runner.expert_load().copy()
    table, slots = runner._table.copy(), {name: array.copy() for name, array in runner._slots.items()}
    told = []
    runner.warm_up(lambda done, total: told.append((done, total)))
    assert told[0][0] == 0
    assert told[-1] == (len(told) - 1, len(told) - 1)
    assert (runner._table == table).all()
    assert all((runner._slots[name] == array).all() for name, array in slots.items())
    assert load is None or (runner.expert_load() == load).all()
    if "/" not in family:
        golden = Golden.read(family)
        for _ in range(2):
            check_greedy(golden, ask_engine(served, golden_rows(golden)))
