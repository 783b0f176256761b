"""Requests with something wrong in them, as bytes, and what comes back."""

import asyncio
import json
import random
from collections import Counter
from typing import Any

WHOLE = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: g\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\n\r\n%s"
)


def broken(rng: random.Random, value: dict[str, Any]) -> bytes:
    """A chat request of `value` with something wrong: cut, flipped, spliced, or with a lying length."""
    body = json.dumps({**value, "stream": rng.random() < 0.3}).encode()
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


async def send(port: int, raw: bytes, statuses: Counter[int], patience_s: float) -> None:
    """Sends bytes and counts the status of what comes back; 0: nothing, or the connection was closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(raw)
        async with asyncio.timeout(patience_s):
            line = await reader.readline()
        statuses[int(line.split()[1]) if line.startswith(b"HTTP/1.1 ") else 0] += 1
    except (TimeoutError, ConnectionError):
        statuses[0] += 1  # still waiting for the rest, or hung up on
    finally:
        writer.transport.abort()
