"""Broken requests on raw sockets: the gateway answers 4xx or hangs up, and goes on.

Ten thousand in front of real engines: `tests/e2e/test_gateway_faults.py`.
"""

import asyncio
import random
from collections import Counter

from broken_requests import broken, send
from gateway_harness import CHAT, asynchronous, running, until

COUNT = 2_000


@asynchronous
async def test_broken_requests_cause_no_500_and_leave_nothing_behind():
    async with running(2, policy="cache_aware") as r:
        rng = random.Random(11)
        statuses: Counter[int] = Counter()
        for _ in range(COUNT // 100):
            await asyncio.gather(*(send(r.port, broken(rng, CHAT), statuses, 0.05) for _ in range(100)))
        assert sum(statuses.values()) == COUNT and statuses[400] > COUNT // 4
        assert not any(status >= 500 for status in statuses), statuses
        await until(lambda: not r.gateway.proxy.concurrency.running)
        assert all(w.in_flight == w.pending_tokens == w.sent_tokens == 0 for w in r.gateway.registry)
        assert (await r.chat()).status_code == 200
