"""Several hosts answer as one process does; the recorded tokens are what one process gives too."""

import itertools
import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from jaxserve.engine.page_hash import chain_hashes, root_hash
from tests.engine.asking import Golden, Row, check_greedy, golden_rows, greedy
from tests.models.tiny import GOLDEN
from tests.multihost.instance import Client, Instance, instance
from tests.text import tiny_tokenizer

PAGE_SIZE = 16

NGRAM = {"speculative_algorithm": "NGRAM", "speculative_ngram_min_match_window_size": 1}
DP2 = {"tp": 8, "dp_size": 2, "enable_dp_attention": True}
# The guide's two nodes have these flags too.
DP8_EP16 = {"tp": 16, "dp_size": 8, "ep": 16, "enable_dp_attention": True, "moe_a2a_backend": "deepep"}
MOVING = {"enable_eplb": True, "ep_num_redundant_experts": 8, "eplb_rebalance_num_iterations": 7}
# Beside the layout each case has something more that host 0 must tell the others step by step.
LAYOUTS = [
    pytest.param("llama", 2, {"tp": 4, **NGRAM}, id="tp4-on-2-hosts-guessing"),
    pytest.param("llama", 2, {**DP2, "num_continuous_decode_steps": 4}, id="dpa2-on-2-hosts-four-steps"),
    pytest.param("mixtral", 4, {**DP8_EP16, **MOVING}, id="dpa8-ep16-on-4-hosts-experts-moving"),
]

GRAMMARS = {"grammar_backend": "llguidance", "skip_tokenizer_init": False}

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
    with_grammar = family == "llama"  # whose vocabulary is wide enough for the tiny tokenizer's
    if with_grammar:
        directory = tiny_tokenizer.write(tmp_path)
        layout = {**layout, **GRAMMARS, "tokenizer_path": directory}
    with instance(tmp_path, GOLDEN / family, num_hosts, compile_cache_dir=compile_cache, **layout) as made:
        for _ in range(2):  # the second time from the prefix cache
            replies = made.ask([*golden_rows(golden), *golden_rows(golden)])
            check_greedy(golden, replies[:4])
        if "speculative_algorithm" in layout:
            assert sum(reply["meta_info"]["spec_accept_token_num"] for reply in replies) > 0
        assert [reply["output_ids"] for reply in made.ask(spiced)] == want
        if with_grammar:
            row = Row(golden.prompts[1].tolist(), {"temperature": 0, "regex": "(yes|no)[0-9]{3}"})
            first, second = made.ask([row, row])
            assert re.fullmatch("(yes|no)[0-9]{3}", first["text"]) and first["text"] == second["text"]
        check_kv_events(made, golden.prompts[3].tolist())
        ranks = httpx.get(f"{made.url}/v1/loads").json()
        assert len(ranks["loads"]) == layout.get("dp_size", 1)
        if "enable_eplb" in layout:
            moved = re.search(r"sglang:eplb_moved_experts\{.*\} (.*)", httpx.get(f"{made.url}/metrics").text)
            assert moved is not None and float(moved[1]) > 0

        running = Client(made, greedy(golden.prompts[0], 40))
        made.launchers[0].send_signal(signal.SIGTERM)
        # What runs is finished first: 16 devices on two busy cores take up to 0.3 s a token.
        assert made.wait_ended(60) == [0] * num_hosts
        running.join()
        assert (len(running.tokens), running.error) == (40, None)
        assert running.most_at_once >= layout.get("num_continuous_decode_steps", 1)
        assert "compiled after readiness" not in made.logs()


def check_kv_events(made: Instance, cached: list[int]) -> None:
    """Host 0 tells what the ranks of all hosts hold, and what they come to hold."""
    new = [11 + i % 90 for i in range(40)]
    with httpx.stream("GET", f"{made.url}/kv_events", timeout=60) as stream:
        events = sse_events(stream.iter_lines())
        assert next(events)[0] == "hello"
        held: set[str] = set()
        for kind, data in events:
            assert kind == "snapshot"
            held |= set(data["pages"])
            if data["last"]:
                break
        assert set(pages_of(cached)) <= held
        made.ask([greedy(new, 1)])
        kind, data = next(events)
        assert (kind, data["pages"]) == ("stored", pages_of(new))
        assert httpx.post(f"{made.url}/flush_cache").status_code == 200
        assert "cleared" in {kind for kind, _ in itertools.islice(events, 1)}


def pages_of(tokens: list[int]) -> list[str]:
    whole = [tokens[i : i + PAGE_SIZE] for i in range(0, len(tokens) - PAGE_SIZE + 1, PAGE_SIZE)]
    return [f"{page:016x}" for page in chain_hashes(root_hash(), whole)]


def sse_events(lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    kind = ""
    for line in lines:
        if line.startswith("event: "):
            kind = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield kind, json.loads(line.removeprefix("data: "))


def alone_replies(alone, rows: list[Row]):
    return [alone.generate(input_ids=[row.prompt], sampling_params=[row.params])[0] for row in rows]
