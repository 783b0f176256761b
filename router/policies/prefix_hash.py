"""prefix_hash: the head of the prompt picks the worker; an overloaded one spills to the least loaded."""

import random
from collections.abc import Sequence

from router.call import Call
from router.config import RouterConfig
from router.policies import Policy, least_loaded
from router.policies.ring import Ring
from router.workers import Worker

BYTES_PER_TOKEN = 4


class PrefixHash(Policy):
    reads_prompt = True

    def __init__(self, config: RouterConfig, rng: random.Random) -> None:
        super().__init__(config, rng)
        self.head_bytes = config.prefix_token_count * BYTES_PER_TOKEN
        self.ring = Ring()

    def choose(self, call: Call, workers: Sequence[Worker]) -> Worker:
        if not call.prompt:
            call.decision = "no_prompt"
            return least_loaded(workers)
        worker = self.ring.find(call.prompt[: self.head_bytes], workers)
        mean = sum(w.requests for w in workers) / len(workers)
        # +1: with a mean under one request everything would be overloaded
        if worker.requests > mean * self.config.prefix_hash_load_factor + 1:
            call.decision = "spill"
            return least_loaded(workers)
        call.decision = "hash"
        return worker
