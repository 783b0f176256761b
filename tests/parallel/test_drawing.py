"""Tokens drawn on a mesh, from parts of the vocabulary, are those of one device with the same seeds."""

import pytest

import jaxserve
from jaxserve.mesh import AXES
from jaxserve.ops import sampling
from jaxserve.parallel.links import LinkPlan
from tests.models.tiny import GOLDEN, Golden

FAMILY = "llama"


def drawn(served):
    """Of a crowd with temperatures and without, none with a filter."""
    prompts = [prompt.tolist() for prompt in Golden.read(FAMILY).prompts]
    params = [
        {"max_new_tokens": 16, "ignore_eos": True, "temperature": 0.5 * (i % 4), "sampling_seed": 7 * i}
        for i in range(8)
    ]
    asked = [prompts[i % len(prompts)] for i in range(8)]
    return [list(reply["output_ids"]) for reply in served.generate(input_ids=asked, sampling_params=params)]


@pytest.fixture
def parts(monkeypatch):
    """How wide the logits are that tokens are drawn from on one device, as programs are traced."""
    seen = []
    draw = sampling.sample_temperature_split

    def noted(logits_RU, *args):
        seen.append(logits_RU.shape[1])
        return draw(logits_RU, *args)

    monkeypatch.setattr(sampling, "sample_temperature_split", noted)
    return seen


@pytest.mark.parametrize("by_links", [False, True])
@pytest.mark.parametrize(
    "layout",
    [
        {"tp": 4},
        {"tp": 2, "num_continuous_decode_steps": 4},
        {"tp": 4, "dp_size": 2, "enable_dp_attention": True, "num_continuous_decode_steps": 3},
    ],
)
def test_drawn_tokens_are_those_of_one_device(engine, compile_cache, monkeypatch, parts, layout, by_links):
    wanted = drawn(engine(FAMILY))
    assert len({tuple(tokens) for tokens in wanted}) > 4
    if by_links:
        of = classmethod(lambda cls, mesh: cls(tuple(mesh.shape[axis] for axis in AXES)))
        monkeypatch.setattr(LinkPlan, "of", of)
    with jaxserve.Engine(
        model_path=str(GOLDEN / FAMILY), dtype="float32", device="cpu", skip_tokenizer_init=True,
        grammar_backend="none", compile_cache_dir=compile_cache, max_total_tokens=1024,
        max_running_requests=4, chunked_prefill_size=32, **layout,
    ) as served:  # fmt: skip
        assert drawn(served) == wanted
        group = layout["tp"] // layout.get("dp_size", 1)
        assert set(parts) == {320 // group}
        assert served.stats()["compiles_after_ready"] == 0
