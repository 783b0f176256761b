"""random: any worker."""

from collections.abc import Sequence

from router.call import Call
from router.policies import Policy
from router.workers import Worker


class Random(Policy):
    def choose(self, call: Call, workers: Sequence[Worker]) -> Worker:
        call.decision = "random"
        return workers[int(self.rng.random() * len(workers))]
