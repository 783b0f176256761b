"""What the benchmark of the engine does to an engine, apart from asking it."""

import pytest

from tests.engine.asking import ask, greedy
from tests.models.tiny import read_config
from tools.bench_offline import level_routers, main, make_text


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


def test_text_is_cut_into_parts_that_begin_apart():
    requests = make_text(list(range(1000)), 4)
    assert [(prompt[0], prompt[-1], len(prompt), out) for prompt, out in requests] == [
        (0, 127, 128, 128), (218, 345, 128, 128), (436, 563, 128, 128), (654, 781, 128, 128)
    ]  # fmt: skip


def test_text_too_short_for_as_many_parts_is_refused():
    with pytest.raises(ValueError, match="a text of 130 tokens is too short for 3 parts of 128"):
        make_text(list(range(130)), 3)


@pytest.mark.parametrize("argv", [["--rows", "text"], ["--rows", "decode", "--text", "held_out.txt"]])
def test_row_of_text_and_its_file_go_together(argv, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--model-path", "m", *argv])
    assert ended.value.code == 2
    assert "--text FILE and the row text go together" in capsys.readouterr().err
