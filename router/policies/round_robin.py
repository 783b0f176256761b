"""round_robin: the workers in turn."""

from collections.abc import Sequence

from router.call import Call
from router.policies import Policy
from router.workers import Worker


class RoundRobin(Policy):
    turn = -1

    def choose(self, call: Call, workers: Sequence[Worker]) -> Worker:
        self.turn = turn = self.turn + 1
        call.decision = "turn"
        return workers[turn % len(workers)]
