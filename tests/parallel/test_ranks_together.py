"""Ranks of one instance do not wait for each other's work: a prompt on one costs another no step."""

import asyncio

import pytest

from jaxserve.messages import Generate, Output, Sampling
from tests.models.tiny import Golden

CHUNK = 32
PROMPT = 320  # ten chunks
LAYOUT = {"tp": 4, "dp_size": 4, "enable_dp_attention": True}


@pytest.fixture
def plans(engine, monkeypatch):
    """The engine, and the steps that it launches from now on: by rank, (decoded rows, chunk lengths)."""
    served = engine("llama", **LAYOUT)
    runner, seen = served._engine.runner, []
    launch = runner.launch

    def watch(plan):
        seen.append([(len(rank.decode), [c.length for c in rank.chunks]) for rank in plan.ranks])
        return launch(plan)

    monkeypatch.setattr(runner, "launch", watch)
    served.flush_cache()
    return served, seen


def spec(rid: str, prompt: list[int], new: int, rank: int) -> Generate:
    sampling = Sampling(max_new_tokens=new, temperature=0)
    return Generate(rid=rid, input_ids=prompt, sampling=sampling, dp_rank=rank)


def unheard(output: Output) -> bool:
    return False


def test_decoding_rank_emits_a_token_in_every_step_of_another_ranks_prefill(plans):
    """Rank 0 computes a long prompt, rank 1 decodes, rank 2 idles."""
    served, seen = plans
    golden = Golden.read("llama")
    short = golden.prompts[1].tolist()

    async def all_at_once():
        tokens = []

        def take(output: Output) -> bool:
            tokens.extend(output.token_ids)
            return True

        decoding = served._connection.generate(spec("decoding", short, 24, 1), take)
        await anext(decoding)
        begun = len(seen)
        long = [5 + i % 300 for i in range(PROMPT)]
        prefill = served._connection.generate(spec("prefill", long, 1, 0), unheard)
        for outputs in (decoding, prefill):
            async for _ in outputs:
                pass
        return tokens, begun

    tokens, begun = served._run(all_at_once())
    assert tokens == golden.greedy[1].tolist()

    steps = seen[begun - 1 :]
    prefilling = [i for i, step in enumerate(steps) if step[0][1]]
    assert [steps[i][0][1] for i in prefilling] == [[CHUNK]] * (PROMPT // CHUNK)
    assert prefilling == list(range(prefilling[0], prefilling[0] + PROMPT // CHUNK)), (
        "the prompt was held back"
    )
    assert all(steps[i][1] == (1, []) for i in prefilling), "the decoding rank missed a step"
    assert all(step[2] == step[3] == (0, []) for step in steps)


def test_no_step_is_longer_than_a_chunk_however_many_ranks_compute_prompts(plans):
    """Chunks of different ranks go through one step side by side: it has a chunk's tokens, not their sum."""
    served, seen = plans

    async def all_at_once():
        prompts = [[7 + rank, *range(3, 2 + PROMPT // 2)] for rank in range(4)]
        waiting = [
            served._connection.generate(spec(f"p{rank}", p, 1, rank), unheard)
            for rank, p in enumerate(prompts)
        ]
        await asyncio.gather(*(anext(outputs, None) for outputs in waiting))

    served._run(all_at_once())
    chunks = [[sum(lengths) for _, lengths in step] for step in seen]
    assert max(max(step) for step in chunks) == CHUNK
    assert [CHUNK] * 4 in chunks
    assert max(b.num_tokens for b in served._engine.runner.buckets) == CHUNK
