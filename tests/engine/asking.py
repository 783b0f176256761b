"""How the tests of the whole engine ask it, and how they judge its tokens."""

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxserve.messages import Generate, Output
from tests.models.tiny import FAMILIES as DENSE_FAMILIES
from tests.models.tiny import HYBRID_FAMILIES, Golden

FAMILIES = (*DENSE_FAMILIES, *HYBRID_FAMILIES)

__all__ = [
    "FAMILIES",
    "NOISE",
    "Followed",
    "Golden",
    "Row",
    "ask",
    "check_greedy",
    "golden_rows",
    "greedy",
    "raw",
]

# Logits of the engine and of the reference agree to 1e-4 (see test_families.py), so two of them may
# move towards each other by 2e-4. Where the reference's first and second choice are closer than
# that, either is right, and what follows is another sequence: comparing stops.
NOISE = 2e-4
NUM_GREEDY = 24


@dataclass(frozen=True)
class Row:
    """One prompt of a batch and its sampling parameters."""

    prompt: list[int]
    params: dict[str, Any]


def greedy(prompt, new: int = NUM_GREEDY, **params: Any) -> Row:
    params = {"temperature": 0, "max_new_tokens": new, "ignore_eos": True, **params}
    return Row([int(t) for t in prompt], params)


def golden_rows(golden: Golden) -> list[Row]:
    return [greedy(prompt) for prompt in golden.prompts]


def ask(engine: Any, rows: list[Row], **fields: Any) -> list[dict[str, Any]]:
    """Submit all rows at once; their replies in order."""
    return engine.generate(
        input_ids=[row.prompt for row in rows], sampling_params=[row.params for row in rows], **fields
    )


def tokens(replies: list[dict[str, Any]]) -> list[list[int]]:
    return [reply["output_ids"] for reply in replies]


def check_greedy(golden: Golden, replies: list[dict[str, Any]]) -> None:
    """Each reply has the recorded tokens, up to the first step that is too close to call."""
    for row, reply in enumerate(replies):
        close = np.flatnonzero(golden.margin[row] < NOISE)
        sure = int(close[0]) if len(close) else NUM_GREEDY
        assert reply["output_ids"][:sure] == golden.greedy[row, :sure].tolist(), f"prompt {row}"
        assert sure > NUM_GREEDY // 2, "the recording proves too little"


class Followed:
    """A request submitted to an EngineClient, as an iterator over its outputs."""

    def __init__(self, client: Any, request: Generate):
        self._came: deque[Output] = deque()
        self._stream = client.generate(request, self._take)

    def _take(self, output: Output) -> bool:
        self._came.append(output)
        return True

    def __aiter__(self) -> "Followed":
        return self

    async def __anext__(self) -> Output:
        while not self._came:
            await anext(self._stream)
        return self._came.popleft()

    async def aclose(self) -> None:
        await self._stream.aclose()


def raw(engine: Any, *requests: Generate) -> list[list[Output]]:
    """Send requests past the checks of the HTTP layer; every output of each, in order."""

    async def follow(request: Generate) -> list[Output]:
        return [output async for output in Followed(engine._connection, request)]

    async def follow_all() -> list[list[Output]]:
        return await asyncio.gather(*map(follow, requests))

    return engine._run(follow_all())
