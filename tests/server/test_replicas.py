"""Several engines as one client: what is added up and what is told apart."""

import asyncio

import msgspec

from jaxserve.messages import Generate, Sampling
from jaxserve.replicas import Replicas
from tests.server import fake_engine
from tests.server.fake_engine import FakeEngine


def replicas(monkeypatch) -> Replicas:
    """Two, whose experts have not had the same to do."""
    info = msgspec.structs.replace(fake_engine.INFO, dp_size=1)
    engines = [FakeEngine(lambda request: [1], info) for _ in range(2)]
    other = {"balancedness": [0.6, 0.7], "device_tokens": [5, 6], "rebalances": 1, "moved": 2}
    ask = engines[1].call

    async def call(method):
        with monkeypatch.context() as patch:
            patch.setattr(fake_engine, "EXPERTS", other)
            return await ask(method)

    engines[1].call = call
    return Replicas(engines)


def test_totals_add_up_and_layers_are_as_balanced_as_where_they_are_least(monkeypatch):
    stats = asyncio.run(replicas(monkeypatch).call("stats"))
    assert stats["retractions"] == 6
    assert stats["prompt_tokens"] == [9, 7, 9, 7]
    assert stats["experts"] == {
        "balancedness": [0.5, 0.7],
        "device_tokens": [10, 30, 5, 6],
        "rebalances": 3,
        "moved": 9,
    }


def test_loads_are_numbered_through(monkeypatch):
    rows = asyncio.run(replicas(monkeypatch).call("loads"))
    assert [row["dp_rank"] for row in rows] == [0, 1]


def test_requests_take_turns_but_for_those_that_name_a_replica(monkeypatch):
    both = replicas(monkeypatch)

    async def ranks():
        seen = []
        for number, rank in enumerate((None, None, 1, 1, None)):
            request = Generate(
                rid=f"r{number}", input_ids=[5], sampling=Sampling(max_new_tokens=1), dp_rank=rank
            )
            async for _ in both.generate(request, lambda output: not seen.append(output.dp_rank)):
                break
        return seen

    assert asyncio.run(ranks()) == [0, 1, 1, 1, 0]
