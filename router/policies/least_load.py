"""least_load: the worker that is expected to answer first.

The estimate is work queued there in prompt tokens, a running request counted as 16 of them: about what
a decode row adds to a step, in tokens of prefill.
"""

from collections.abc import Sequence

from router.call import Call
from router.policies import Policy
from router.workers import Worker

RUNNING_REQUEST_TOKENS = 16


def queued_tokens(worker: Worker) -> float:
    """Work queued at `worker`, in prompt tokens."""
    return (
        worker.pending_tokens
        + worker.sibling_tokens
        + worker.foreign_tokens
        + RUNNING_REQUEST_TOKENS * (worker.in_flight + worker.sibling_requests + worker.foreign_requests)
    )


class LeastLoad(Policy):
    reads_prompt = True

    def choose(self, call: Call, workers: Sequence[Worker]) -> Worker:
        call.decision = "least_queued"
        return min(workers, key=lambda w: (queued_tokens(w), w.total))
