"""A vocabulary that the group does not divide is padded, and nobody can tell from the answers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.engine.asking import Row, ask
from tests.models.tiny import read_config, read_tensors

CASES = [
    pytest.param("llama", 317, {"tp": 2}, id="317-tp2"),
    pytest.param("llama3_tied", 9, {"tp": 4}, id="9-tied-tp4-of-which-one-has-padding-alone"),
    pytest.param("random", 9, {"tp": 8}, id="9-tp8"),
]
# Sums of float32 in another order; see test_families.py.
TOLERANCE = 1e-4


@pytest.fixture(scope="session")
def cut_checkpoint(tmp_path_factory):
    """`cut_checkpoint(family, vocab)`: a recorded checkpoint with only its first tokens."""
    made: dict[tuple[str, int], Path] = {}

    def make(family: str, vocab: int) -> Path:
        if (family, vocab) not in made:
            made[family, vocab] = path = tmp_path_factory.mktemp(f"{family}-{vocab}")
            config = {**read_config("llama" if family == "random" else family), "vocab_size": vocab}
            if family == "random":  # padding rows get random numbers as all others do, not zeros
                config |= {"num_hidden_layers": 1, "num_attention_heads": 8}
            else:
                save_file(cut(read_tensors(family), vocab), path / "model.safetensors")
            (path / "config.json").write_text(json.dumps({**config, "eos_token_id": vocab - 1}))
        return made[family, vocab]

    return make


def cut(tensors, vocab: int):
    matrices = ("embed_tokens.weight", "lm_head.weight")
    return {name: x[:vocab] if name.endswith(matrices) else x for name, x in tensors.items()}


def made_with(family: str, layout: dict[str, Any]) -> dict[str, Any]:
    return {**layout, "load_format": "dummy"} if family == "random" else layout


def rows(vocab: int) -> list[Row]:
    """Each needs another part of the sample programs; the last ids are the ones beside the padding."""
    last = vocab - 1
    spices = [
        {"temperature": 0},
        {"temperature": 0, "logit_bias": {str(last): 100.0}},
        {"temperature": 0, "repetition_penalty": 1.4},
        {"temperature": 0, "frequency_penalty": 1.0, "logit_bias": {str(last): -100.0}},
        {"temperature": 2.0, "sampling_seed": 3},
        {"temperature": 1.5, "top_k": vocab - 1, "top_p": 0.99, "sampling_seed": 4},
    ]
    prompt = [last, *range(1, min(9, vocab)), last]
    return [Row(prompt, {"max_new_tokens": 12, "ignore_eos": True, **spice}) for spice in spices]


@pytest.mark.parametrize("family, vocab, layout", CASES)
def test_padded_vocabulary_answers_as_one_device_does(engine, cut_checkpoint, family, vocab, layout):
    path = str(cut_checkpoint(family, vocab))
    one, split = engine(path, **made_with(family, {})), engine(path, **made_with(family, layout))
    matrices = [leaf for leaf in split._engine.runner._leaves if vocab <= leaf.shape[0] < vocab + 8]
    group = layout["tp"]
    assert matrices and all(m.shape[0] == -(-vocab // group) * group for m in matrices)
    assert all(m.addressable_shards[0].data.shape[0] == -(-vocab // group) for m in matrices)

    asked = {
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": min(20, vocab),
        "token_ids_logprob": [0, vocab - 1],
    }
    for want, got in zip(ask(one, rows(vocab), **asked), ask(split, rows(vocab), **asked)):
        assert got["output_ids"] == want["output_ids"]
        assert max(got["output_ids"]) < vocab
        for part in ("input", "output"):
            for kind in ("token_logprobs", "top_logprobs", "token_ids_logprobs"):
                name = f"{part}_{kind}"
                compare(got["meta_info"][name], want["meta_info"][name])


def test_probabilities_of_the_padded_vocabularys_tokens_sum_to_one(engine, cut_checkpoint):
    split = engine(str(cut_checkpoint("random", 9)), **made_with("random", {"tp": 8}))
    [reply] = ask(split, rows(9)[:1], return_logprob=True, top_logprobs_num=9)
    for position in reply["meta_info"]["output_top_logprobs"]:
        assert sorted(token for _, token, _ in position) == list(range(9))
        assert sum(np.exp(logprob) for logprob, _, _ in position) == pytest.approx(1, abs=1e-5)


def compare(got, want):
    """Entries are [logprob, token id, text], nested by position; the first prompt token has none."""
    got, want = flat(got), flat(want)
    assert [ids for _, ids in got] == [ids for _, ids in want]
    np.testing.assert_allclose([p for p, _ in got], [p for p, _ in want], rtol=0, atol=TOLERANCE)


def flat(entries) -> list[tuple[float, int]]:
    if entries is None:
        return []
    if len(entries) == 3 and not isinstance(entries[0], list | tuple):
        return [] if entries[0] is None else [(entries[0], entries[1])]
    return [entry for inner in entries for entry in flat(inner)]
