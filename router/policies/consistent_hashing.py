"""consistent_hashing: the caller's routing key picks the worker.

`X-SMG-Target-Worker` (index in registration order, id or URL) is obeyed when that worker is usable;
else `X-SMG-Routing-Key` goes to its place on the ring; else any worker.
"""

import random
from collections.abc import Sequence

from router.call import Call
from router.config import RouterConfig
from router.policies import Policy
from router.policies.ring import Ring
from router.workers import Worker


class ConsistentHashing(Policy):
    def __init__(self, config: RouterConfig, rng: random.Random) -> None:
        super().__init__(config, rng)
        self.ring = Ring()

    def choose(self, call: Call, workers: Sequence[Worker]) -> Worker:
        target = call.target_worker
        if target is not None and target in workers:
            call.decision = "target"
            return target
        if call.routing_key:
            call.decision = "key"
            return self.ring.find(call.routing_key.encode(), workers)
        call.decision = "random"
        return workers[int(self.rng.random() * len(workers))]
