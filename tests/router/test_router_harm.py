"""Broken requests on raw sockets: the gateway answers 4xx or hangs up, and goes on.

Ten thousand in front of real engines: `tests/e2e/test_gateway_faults.py`.
"""

import asyncio
import random
from collections import Counter

from broken_requests import broken
from gateway_harness import CHAT, asynchronous, running, until

COUNT = 2_000


@asynchronous
async def test_broken_requests_cause_no_500_and_leave_nothing_behind():
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
            await asyncio.gather(*(one(broken(rng, CHAT)) for _ in range(100)))
        assert sum(statuses.values()) == COUNT and statuses[400] > COUNT // 4
        assert not any(status >= 500 for status in statuses), statuses
        await until(lambda: not r.gateway.proxy.concurrency.running)
        assert all(w.in_flight == w.pending_tokens == w.sent_tokens == 0 for w in r.gateway.registry)
        assert (await r.chat()).status_code == 200
