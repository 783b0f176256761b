"""Ten thousand broken requests on raw sockets: the gateway answers 4xx or hangs up, and goes on."""

import asyncio
import json
import random
from collections import Counter

from gateway_harness import CHAT, asynchronous, running, until

COUNT = 10_000
WHOLE = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: g\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\n\r\n%s"
)


def broken(rng: random.Random) -> bytes:
    """One request with something wrong: cut, flipped, spliced, or with a lying length."""
    body = json.dumps({**CHAT, "stream": rng.random() < 0.3}).encode()
    raw = bytearray(WHOLE % (len(body), body))
    kind = rng.randrange(6)
    if kind == 0:
        return bytes(raw[: rng.randrange(1, len(raw))])
    if kind == 1:
        for _ in range(rng.randrange(1, 6)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
    elif kind == 2:
        at = rng.randrange(len(raw))
        raw[at:at] = rng.randbytes(rng.randrange(1, 40))
    elif kind == 3:
        return WHOLE % (rng.choice([0, 1, 10**9, 10**30, len(body) + 7, len(body) - 7]), body)
    elif kind == 4:
        return rng.randbytes(rng.randrange(1, 200)) + b"\r\n\r\n"
    else:
        line = rng.choice(
            [b"GET / HTTP/9.9", b"POST /\xff\xfe HTTP/1.1", b"BREW /generate HTTP/1.1", b"POST * HTTP/1.1",
             b"GET http://[::1 HTTP/1.1", b"POST /generate?%00=%ff HTTP/1.1", b"\r\n\r\n\r\nGET / HTTP/1.1"]
        )  # fmt: skip
        return line + b"\r\nhost: g\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n"
    return bytes(raw)


@asynchronous
async def test_ten_thousand_broken_requests_cause_no_500_and_leave_nothing_behind():
    async with running(2, policy="cache_aware") as r:
        rng = random.Random(11)
        statuses: Counter[int] = Counter()

        async def one(raw: bytes) -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", r.port)
            try:
                writer.write(raw)
                async with asyncio.timeout(0.05):
                    line = await reader.readline()
                statuses[int(line.split()[1]) if line.startswith(b"HTTP/1.1 ") else 0] += 1
            except (TimeoutError, ConnectionError):
                statuses[0] += 1  # still waiting for the rest, or hung up on
            finally:
                writer.transport.abort()

        for _ in range(COUNT // 100):
            await asyncio.gather(*(one(broken(rng)) for _ in range(100)))
        assert sum(statuses.values()) == COUNT and statuses[400] > COUNT // 4
        assert not any(status >= 500 for status in statuses), statuses
        await until(lambda: not r.gateway.proxy.concurrency.running)
        assert all(w.in_flight == w.pending_tokens == w.sent_tokens == 0 for w in r.gateway.registry)
        assert (await r.chat()).status_code == 200
