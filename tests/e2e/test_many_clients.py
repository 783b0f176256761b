"""Two hundred clients at once, many of whom leave: no page is lost and nobody's tokens change."""

import asyncio
import contextlib
import json
import random
import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest

from tests.e2e.process import PATIENCE_S, body

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


ABORT_AGAIN_AND_AGAIN = """
import sys
import httpx

url, timeout_s, *rids = sys.argv[1:]
with httpx.Client(base_url=url, timeout=float(timeout_s)) as http:
    for number in range(sys.maxsize):
        for rid in rids:
            assert http.post("/abort_request", json={"rid": rid}).status_code == 200
        if number == 0:
            print("all once", flush=True)
"""


@contextlib.contextmanager
def aborted(url: str, rids: list[str]) -> Iterator[None]:
    """By a process: two hundred streams may keep the interpreter of this one for seconds."""
    command = [sys.executable, "-c", ABORT_AGAIN_AND_AGAIN, url, str(PATIENCE_S), *rids]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "all once\n"
            yield
            assert process.poll() is None, "an abort was refused"
        finally:
            process.kill()


async def ask_all(url: str, rids: list[str], longest: int, room: int):
    """Ends of a crowd, beside which those of `rids` wait for their turn and are aborted."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S * 4, limits=limits) as http:
        crowd = [asyncio.create_task(client(http, number, longest, room)) for number in range(NUM_CLIENTS)]
        bodies = [body(PROBE, room, rid=rid, priority=-1) for rid in rids]
        waiting = [asyncio.create_task(http.post("/generate", json=asked)) for asked in bodies]
        ends, replies = await asyncio.gather(*crowd), await asyncio.gather(*waiting)
        reasons = [reply.json()["meta_info"]["finish_reason"]["type"] for reply in replies]
        assert set(reasons) <= {"abort", "length"} and "abort" in reasons
        return ends


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

    rids = [f"waiting-{number}" for number in range(NUM_CLIENTS // 10)]
    with aborted(server.url, rids):
        ends = asyncio.run(ask_all(server.url, rids, longest, room))

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
