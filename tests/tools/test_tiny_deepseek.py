"""The trained tiny model: the serving engine against the training code, and against its own text."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from tools.tiny_deepseek import NOWHERE, MoE, Shape, TinyDeepseek, sum_rows
from tools.train_tiny import main, make_tokenizer

TRAINED = Path(__file__).parents[2] / "configs" / "tiny-deepseek"
# Bits a byte on the first 2,000 bytes of the held-out text, in pieces of 250: what the checkpoint gave in
# float32 when it was trained. A wrong expert or position costs tenths; layouts differed by 1e-7.
HELD_OUT_BITS = 2.2946


def prompt_logprobs(served, prompts: list[list[int]]) -> list[np.ndarray]:
    replies = served.generate(
        input_ids=prompts,
        sampling_params={"max_new_tokens": 1, "temperature": 0},
        return_logprob=True,
        logprob_start_len=0,
    )
    return [
        np.array([entry[0] for entry in reply["meta_info"]["input_token_logprobs"][1:]]) for reply in replies
    ]


def test_serving_gives_the_logits_of_the_training_code(engine, tmp_path):
    shape = Shape(vocab=320, hidden=32, dense_ffn=48, expert_ffn=16, layers=2, heads=4, q_rank=24, kv_rank=16)
    model = TinyDeepseek(dataclasses.replace(shape), nnx.Rngs(1))
    tensors = {name: np.asarray(x, np.float32) for name, x in model.hf_tensors().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(shape.hf_config()))
    tokens = np.random.default_rng(0).integers(0, 256, (2, 40))
    logits, _, _ = model(jnp.asarray(tokens), 100.0)  # enough capacity that no token is dropped
    want = np.asarray(logits - jnp.log(jnp.exp(logits).sum(-1, keepdims=True)))
    for row, got in zip(range(2), prompt_logprobs(engine(str(tmp_path)), tokens.tolist()), strict=True):
        expected = np.take_along_axis(want[row, :-1], tokens[row, 1:, None], 1)[:, 0]
        np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize(
    "layout",
    [{}, {"tp": 8, "dp_size": 8, "enable_dp_attention": True, "ep": 8}],
    ids=["one device", "dp attention and experts over 8"],
)
def test_trained_model_predicts_its_held_out_text_on(engine, layout):
    text = (TRAINED / "held_out.txt").read_bytes()[:2000]
    prompts = [[256, *text[at : at + 250]] for at in range(0, 2000, 250)]
    bits = -np.concatenate(prompt_logprobs(engine(str(TRAINED), **layout), prompts)).mean() / math.log(2)
    assert bits == pytest.approx(HELD_OUT_BITS, abs=1e-3)


def test_trained_checkpoint_is_small_and_has_every_layer():
    tensors = load_file(TRAINED / "model.safetensors")
    assert sum(x.nbytes for x in tensors.values()) < 7_000_000
    assert "model.layers.4.eh_proj.weight" in tensors  # the MTP layer


def test_rows_are_summed_and_gradients_go_back_to_the_rows_that_were_read():
    x = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    index, inverse = jnp.array([[0, 2], [1, NOWHERE]]), jnp.array([[0], [1], [0], [NOWHERE]])
    got, pull_back = jax.vjp(lambda x: sum_rows(x, index, inverse), x)
    assert got.tolist() == [[6.0, 8.0], [3.0, 4.0]]
    (gradient,) = pull_back(jnp.array([[1.0, 10.0], [2.0, 20.0]]))
    assert gradient.tolist() == [[1.0, 10.0], [2.0, 20.0], [1.0, 10.0], [0.0, 0.0]]


def test_tokens_past_the_capacity_of_their_experts_get_the_shared_expert_alone():
    layer = MoE(Shape(hidden=8, expert_ffn=4), nnx.Rngs(0))
    layer.bias[...] = jnp.where(jnp.arange(16) < 4, 9.0, 0.0)  # every token chooses the first four
    x = jax.random.normal(jax.random.key(1), (2, 16, 8))
    out, load = layer(x, 1.0)  # 32 tokens x 4 choices / 16 experts, and one to spare: 9 tokens an expert
    routed = np.abs(np.asarray(out - layer.shared_experts(x))).max(-1).reshape(-1)
    assert (routed > 1e-3).tolist() == [True] * 9 + [False] * 23
    assert load.tolist() == [4.0] * 4 + [0.0] * 12


def test_byte_tokenizer_gives_bytes_and_back():
    tokenizer = make_tokenizer()
    text = "def f(x): return 'Grüße, 世界 🌍'\n"
    assert tokenizer.encode(text).ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text


def test_fewer_steps_than_the_warm_up_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["--to", str(tmp_path / "made"), "--steps", "50"])
    assert end.value.code == 2
    assert "--steps 50: the learning rate takes 50 to warm up; give more" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()
