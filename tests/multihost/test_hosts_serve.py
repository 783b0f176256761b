"""Several hosts answer as one process does; the recorded tokens are what one process gives too."""

import signal
from pathlib import Path

import httpx
import pytest

from tests.engine.asking import Golden, Row, check_greedy, golden_rows, greedy
from tests.models.tiny import GOLDEN
from tests.multihost.instance import Client, instance

LAYOUTS = [
    pytest.param("llama", 2, {"tp": 4}, id="tp4-on-2-hosts"),
    pytest.param("llama", 2, {"tp": 8, "dp_size": 2, "enable_dp_attention": True}, id="dpa2-on-2-hosts"),
    pytest.param(
        "mixtral", 4, {"tp": 8, "dp_size": 4, "ep": 8, "enable_dp_attention": True}, id="dpa4-ep8-on-4-hosts"
    ),
]

# Each needs another part of the sample programs, and the last ones state that is kept per slot.
SPICES = [
    {"temperature": 0.8, "sampling_seed": 5},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "sampling_seed": 6},
    {"temperature": 0, "repetition_penalty": 1.4},
    {"temperature": 0, "logit_bias": {"7": 3.0}},
]


@pytest.mark.parametrize("family, num_hosts, layout", LAYOUTS)
def test_hosts_give_the_recorded_tokens_compile_nothing_more_and_drain(
    tmp_path: Path, compile_cache: str, engine, family, num_hosts, layout
):
    golden, alone = Golden.read(family), engine(family)
    spiced = [
        Row(golden.prompts[1].tolist(), {"max_new_tokens": 16, "ignore_eos": True, **s}) for s in SPICES
    ]
    want = [reply["output_ids"] for reply in alone_replies(alone, spiced)]
    with instance(tmp_path, GOLDEN / family, num_hosts, compile_cache_dir=compile_cache, **layout) as made:
        for _ in range(2):  # the second time from the prefix cache
            check_greedy(golden, made.ask([*golden_rows(golden), *golden_rows(golden)])[:4])
        assert [reply["output_ids"] for reply in made.ask(spiced)] == want
        ranks = httpx.get(f"{made.url}/v1/loads").json()
        assert len(ranks["loads"]) == layout.get("dp_size", 1)

        running = Client(made, greedy(golden.prompts[0], 100))
        made.launchers[0].send_signal(signal.SIGTERM)
        assert made.wait_ended() == [0] * num_hosts
        running.join()
        assert (len(running.tokens), running.error) == (100, None)
        assert "compiled after readiness" not in made.logs()


def alone_replies(alone, rows: list[Row]):
    return [alone.generate(input_ids=[row.prompt], sampling_params=[row.params])[0] for row in rows]
