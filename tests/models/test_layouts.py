"""Models over a mesh of virtual CPU devices give the logits of one device."""

import numpy as np
import pytest

from jaxserve.mesh import Layout
from jaxserve.ops import backend
from tests.models.tiny import Chunk, Golden, TinyEngine, load_tiny

TOLERANCE = 1e-4  # as in test_families.py; a mesh only splits the sums once more

# What each case adds: one device in a mesh; KV heads divided; KV heads fewer than the group
# (2 heads on 4 devices, 1 head on 2); several ranks; an `ep` axis inside the group.
CASES = [
    ("llama", Layout(1)),
    ("llama", Layout(2)),
    ("llama", Layout(4)),
    ("llama", Layout(4, dp=2)),
    ("llama", Layout(4, dp=1, ep=2)),
    ("llama", Layout(8, dp=4)),
    ("llama3_tied", Layout(4, dp=2)),
    ("qwen2", Layout(2)),
    ("qwen3", Layout(4, dp=2)),
    ("mistral", Layout(4)),
    ("gemma3", Layout(2)),
    ("gemma3", Layout(4, dp=2)),
]


def name(case):
    return f"{case[0]}-{'x'.join(map(str, case[1].shape))}"


@pytest.mark.parametrize("case", CASES, ids=name)
def test_ranks_with_their_own_mix_of_work_give_the_recorded_logits(case):
    """Ranks decode beside a prefill, prefill only, or have nothing, all in one step."""
    check_mixed_steps(*case)


# Heads that lie side by side in one array, with norms (Qwen3) and without: each device has its share of both.
@pytest.mark.parametrize(
    "case", [("llama", Layout(2)), ("qwen3", Layout(2)), ("qwen3", Layout(4, dp=2))], ids=name
)
def test_joined_heads_through_kernels_give_the_recorded_logits(case):
    with backend.use("interpret"):
        check_mixed_steps(*case, joined=True)


def check_mixed_steps(family, layout, **options):
    golden = Golden.read(family)
    engine = TinyEngine(load_tiny(family), layout=layout, **options)
    short, long = golden.prompts[2], golden.prompts[3]
    last = len(short) - 1
    nothing = [[] for _ in range(layout.dp)]

    first = [[Chunk(0, 0, short[:last])] for _ in range(layout.dp)]
    engine.step(nothing, first, R=2, P=48)

    decode, prefill = list(nothing), list(nothing)
    decode[0], prefill[0] = [Chunk(0, last, short[last:])], [Chunk(1, 0, long[:37])]
    if layout.dp > 1:
        prefill[1] = [Chunk(3, 0, long[:48])]
    logits = engine.step(decode, prefill, R=2, P=48)
    close(logits[0][0], golden.logits[2][last])
    close(logits[0][2:39], golden.logits[3][:37])
    if layout.dp > 1:
        close(logits[1][2:50], golden.logits[3][:48])

    # A step without prefill tokens, after one in which some ranks were idle.
    decode = [[Chunk(0, last, short[last:])] for _ in range(layout.dp)]
    for rank in engine.step(decode, nothing, R=2, P=0):
        close(rank[0], golden.logits[2][last])


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)


LATENT_CASES = {"joined": ("deepseek_v2_lite", None), "heads_split": ("deepseek_v3", Layout(4, dp=2))}


@pytest.mark.parametrize("case", LATENT_CASES.values(), ids=LATENT_CASES)
def test_latent_attention_made_of_kernels_gives_the_logits_of_the_reference(case):
    """Through the model: with products joined as one device has them, or heads split over devices."""
    family, layout = case
    model = load_tiny(family)
    prompt = np.arange(20) * 5

    def logits(where):
        with backend.use(where):
            engine = TinyEngine(model, layout=layout, joined=layout is None)
            nothing = [[] for _ in range(engine.ranks)]
            first = engine.step(nothing, [[Chunk(0, 0, prompt[:17])] for _ in nothing], R=2, P=32)
            decode = [[Chunk(0, 17, prompt[17:18])] for _ in nothing]
            return *first, *engine.step(decode, [[Chunk(3, 0, prompt)] for _ in nothing], R=2, P=32)

    for got, want in zip(logits("interpret"), logits("reference"), strict=True):
        close(got, want)
