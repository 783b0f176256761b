"""`python -m tools.train_tiny --to DIR`: train the tiny DeepSeek-V3-shaped model and write a checkpoint.

The text is the documentation strings of Python's standard library (PSF licence, may be redistributed),
as bytes; 5 % of it is held out. 18 minutes on two cores of a slow machine, at 0.87 s a step. The checkpoint
has the Hugging Face layout, bfloat16 weights, a byte-level tokenizer and the held-out text beside it.
"""

import argparse
import ast
import functools
import json
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tools.tiny_deepseek import Shape, TinyDeepseek

BOS, EOS = 256, 257
CONTEXT, BATCH = 256, 16
BIAS_SPEED = 1e-3  # how far a step moves the routing bias of an expert with too much or too little load
MTP_WEIGHT = 0.3
WARM_UP = 50  # steps until the full learning rate


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.train_tiny", description=__doc__)
    parser.add_argument("--to", type=Path, required=True, help="directory to write")
    parser.add_argument("--steps", type=int, default=1200, help="of 4,096 tokens (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.steps <= WARM_UP:
        parser.error(f"--steps {args.steps}: the learning rate takes {WARM_UP} to warm up; give more")
    documents = list(read_documents())
    held_out = documents[::20]
    training = to_tokens(d for i, d in enumerate(documents) if i % 20)
    held_out_tokens = to_tokens(held_out)
    print(
        f"{len(documents)} documents, {training.size:,} bytes to learn, {held_out_tokens.size:,} held out",
        flush=True,
    )
    model = train(training, held_out_tokens, args.steps, args.seed)
    write(model, args.to, "\n".join(held_out)[:65536])
    return 0


def read_documents() -> Iterator[str]:
    """The documentation strings of each standard-library module, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(parts):
            continue
        try:
            tree = ast.parse(file.read_text("utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        strings = [
            ast.get_docstring(node)
            for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        ]
        text = "\n\n".join(s for s in strings if s)
        if len(text) > 200:
            yield text


def to_tokens(documents: Iterator[str] | list[str]) -> np.ndarray:
    parts = [[BOS, *document.encode(), EOS] for document in documents]
    return np.concatenate([np.array(part, np.int32) for part in parts])


def train(training: np.ndarray, held_out: np.ndarray, steps: int, seed: int) -> TinyDeepseek:
    model = TinyDeepseek(Shape(), nnx.Rngs(seed))
    count = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    print(f"{count:,} parameters", flush=True)
    schedule = optax.warmup_cosine_decay_schedule(0, 3e-3, WARM_UP, steps, 1e-4)
    optimizer = nnx.Optimizer(
        model,
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, 0.9, 0.95, weight_decay=0.05)),
        wrt=nnx.Param,
    )
    step_on = nnx.cached_partial(train_step, model, optimizer)  # or flax takes both apart at every step
    rng = np.random.default_rng(seed)
    begin_s = time.monotonic()
    for step in range(1, steps + 1):
        at = rng.integers(0, training.size - CONTEXT - 1, BATCH)
        tokens = np.stack([training[i : i + CONTEXT + 1] for i in at])
        loss = step_on(jnp.asarray(tokens))
        if step % 50 == 0 or step == steps:
            bits = evaluate(model, held_out)
            seconds = time.monotonic() - begin_s
            print(
                f"step {step}: loss {float(loss):.3f}, held out {bits:.3f} bits a byte, {seconds:.0f} s",
                flush=True,
            )
    return model


@nnx.jit
def train_step(model: TinyDeepseek, optimizer: nnx.Optimizer, token_BT: jax.Array) -> jax.Array:
    def loss_of(model: TinyDeepseek) -> tuple[jax.Array, list[jax.Array]]:
        logits, after, loads = model(token_BT[:, :-1])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, token_BT[:, 1:]).mean()
        mtp = optax.softmax_cross_entropy_with_integer_labels(after, token_BT[:, 2:]).mean()
        return loss + MTP_WEIGHT * mtp, loads

    (loss, loads), gradients = nnx.value_and_grad(loss_of, has_aux=True)(model)
    optimizer.update(model, gradients)
    for layer, load_E in zip(model.moe_layers, loads, strict=True):
        layer.bias[...] -= BIAS_SPEED * jnp.sign(load_E - 1)
    return loss


def evaluate(model: TinyDeepseek, held_out: np.ndarray, sequences: int = 16) -> float:
    """Bits a byte on the first sequences of the held-out text."""
    tokens = held_out[: sequences * (CONTEXT + 1)].reshape(sequences, CONTEXT + 1)
    return float(_bits(model, jnp.asarray(tokens)))


@nnx.jit
def _bits(model: TinyDeepseek, token_BT: jax.Array) -> jax.Array:
    logits, _, _ = model(token_BT[:, :-1], 4.0)
    return optax.softmax_cross_entropy_with_integer_labels(logits, token_BT[:, 1:]).mean() / jnp.log(2.0)


# ---- the checkpoint ----


def write(model: TinyDeepseek, directory: Path, held_out: str) -> None:
    """Hugging Face layout; the routing bias stays float32, as in DeepSeek's own checkpoints."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: np.asarray(x if name.endswith("correction_bias") else x.astype(jnp.bfloat16))
        for name, x in model.hf_tensors().items()
    }
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(model.s.hf_config(), indent=2) + "\n")
    (directory / "generation_config.json").write_text('{"eos_token_id": 257}\n')
    (directory / "held_out.txt").write_text(held_out)
    make_tokenizer().save(str(directory / "tokenizer.json"))
    settings = {
        "add_bos_token": True,
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": "{{ bos_token }}{% for m in messages %}{{ m['content'] }}\n\n{% endfor %}",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def make_tokenizer() -> Tokenizer:
    """One token a byte, and two special ones."""
    vocabulary = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<bos>", special=True), AddedToken("<eos>", special=True)])
    return tokenizer


@functools.cache
def byte_symbols() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte if byte in plain else next(spare)) for byte in range(256)]


if __name__ == "__main__":
    sys.exit(main())
