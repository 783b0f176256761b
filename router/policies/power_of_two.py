"""power_of_two: the less loaded of two random workers.

Load is the gateway's own live count of requests plus what workers report of others' work; a polled
number that is seconds old would herd everything to one worker between polls.
"""

from collections.abc import Sequence

from router.call import Call
from router.policies import Policy, least_loaded
from router.workers import Worker


class PowerOfTwo(Policy):
    def choose(self, call: Call, workers: Sequence[Worker]) -> Worker:
        call.decision = "lighter_of_two"
        if len(workers) == 1:
            return workers[0]
        return least_loaded(self.rng.sample(workers, 2))
