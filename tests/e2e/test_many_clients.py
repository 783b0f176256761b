"""Two hundred clients at once, many of whom leave: no page is lost and nobody's tokens change."""

import asyncio
import json
import random

import httpx
import psutil
import pytest

from tests.e2e.process import PATIENCE_S, Server, body

NUM_CLIENTS = 200
PROBE = [50, 51, 52] * 15
PROMPTS = [
    [(i * 37 + p * p) % 300 + 3 for p in range(length)] for i, length in enumerate((1, 9, 40, 130, 200))
]


async def client(
    http: httpx.AsyncClient, number: int, longest: int, room: int
) -> tuple[int, list[int], str, int]:
    """One streaming client; returns (its prompt, tokens, how it ended, retractions)."""
    draw = random.Random(number)
    which, rid = draw.randrange(len(PROMPTS)), f"client-{number}"
    end = draw.choice(["stays", "stays", "leaves", "is aborted"])
    after = draw.randrange(longest // 2)
    # An abort is overtaken by the end of a short output.
    wanted = room if end == "is aborted" else draw.randint(longest // 3, longest)
    fields = body(PROMPTS[which], wanted, rid=rid, stream=True)
    tokens, reason, retractions = [], "nothing", 0

    async def abort() -> None:
        assert (await http.post("/abort_request", json={"rid": rid})).status_code == 200

    async with asyncio.TaskGroup() as group, http.stream("POST", "/generate", json=fields) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if not line or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            tokens, meta = event["output_ids"], event["meta_info"]
            retractions = meta["num_retractions"]
            if meta["finish_reason"]:
                reason = meta["finish_reason"]["type"]
            elif len(tokens) >= after and end == "leaves":
                return which, tokens, "left", retractions
            elif len(tokens) >= after and end == "is aborted":
                end = "stays"
                group.create_task(abort())
    assert reason in ("length", "abort")
    return which, tokens, reason, retractions


async def ask_and_abort(http: httpx.AsyncClient, engine: psutil.Process, rids: list[str], room: int):
    """Requests that are aborted before they can end: the engine stands still meanwhile.

    Each is asked for twice: that one is refused says that the other is in.
    """
    engine.suspend()
    try:
        bodies = [body(PROBE, room, rid=rid, priority=-1) for rid in rids for _ in range(2)]
        asking = {asyncio.create_task(http.post("/generate", json=asked)) for asked in bodies}
        refused = set()
        while len(refused) < len(rids):
            done, asking = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
            refused |= done
        assert all("is in use" in task.result().text for task in refused)
        for rid in rids:
            assert (await http.post("/abort_request", json={"rid": rid})).status_code == 200
    finally:
        engine.resume()
    for task in asking:
        assert (await task).json()["meta_info"]["finish_reason"]["type"] == "abort"


async def ask_all(server: Server, longest: int, room: int):
    """Ends of a crowd, beside which some wait for their turn and are aborted."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S * 4, limits=limits) as http:
        crowd = [asyncio.create_task(client(http, number, longest, room)) for number in range(NUM_CLIENTS)]
        rids = [f"waiting-{number}" for number in range(NUM_CLIENTS // 10)]
        await ask_and_abort(http, server.engine, rids, room)
        return await asyncio.gather(*crowd)


@pytest.mark.parametrize(
    "server_flags, longest, room, retracts",
    [
        (("--max-total-tokens", "8192"), 60, 600, False),
        (("--max-total-tokens", "448", "--context-length", "448"), 150, 240, True),
    ],
    ids=["roomy", "tight"],
)
def test_two_hundred_clients_leave_nothing_behind(launch, server_flags, longest, room, retracts):
    server = launch(*server_flags).until_ready()
    before = server.generate(PROBE, 24)["output_ids"]

    ends = asyncio.run(ask_all(server, longest, room))

    server.until_idle()
    assert {reason for _, _, reason, _ in ends} >= {"length", "left"}
    assert (sum(retractions for *_, retractions in ends) > 0) is retracts  # eight of 800 tokens always fit
    for which in range(len(PROMPTS)):  # whatever its end, a client of a prompt got the same tokens
        outputs = sorted((tokens for w, tokens, *_ in ends if w == which), key=len)
        assert all(shorter == outputs[-1][: len(shorter)] for shorter in outputs)
        assert len(outputs[-1]) > longest // 3

    assert server.generate(PROBE, 24)["output_ids"] == before
    assert server.http.post("/flush_cache", params={"timeout": PATIENCE_S}).status_code == 200
    row = server.loads()
    assert (row["num_used_tokens"], row["num_cached_tokens"], row["token_usage"]) == (0, 0, 0)
    after = server.generate(PROBE, 24)
    assert after["meta_info"]["cached_tokens"] == 0
    assert after["output_ids"] == before
    server.process.terminate()
    assert server.wait() == 0, server.output()
    assert "Traceback" not in server.output() and "ERROR" not in server.output()
