"""What the benchmark of the engine does to an engine, apart from asking it."""

import pytest

from tests.engine.asking import ask, greedy
from tests.models.tiny import read_config
from tools.bench_offline import level_routers


def test_level_routers_send_every_token_to_the_same_experts(engine):
    served = engine("deepseek_v2_lite", load_format="dummy")
    config, rows = read_config("deepseek_v2_lite"), [greedy([5 + i, 9, 30 + i], new=6) for i in range(3)]
    before = served._engine.runner.expert_load().copy()
    ask(served, rows)
    spread = served._engine.runner.expert_load() - before
    level_routers(served)
    before = served._engine.runner.expert_load().copy()
    served.flush_cache()
    ask(served, rows)
    level = served._engine.runner.expert_load() - before
    assert (spread > 0).sum(axis=1).min() > config["num_experts_per_tok"]
    assert ((level > 0).sum(axis=1) == config["num_experts_per_tok"]).all()


def test_level_routers_of_a_dense_model_are_a_mistake(engine):
    with pytest.raises(AssertionError, match="no experts"):
        level_routers(engine())
