"""What the engine counts: totals since its start, and its load at this moment."""

from collections import deque
from collections.abc import Sequence
from typing import Any

from jaxserve.engine.drafting import Drafting
from jaxserve.engine.scheduler import Scheduler
from jaxserve.messages import Info, Output, RankLoad

WINDOW_S = 5.0  # over which throughput is averaged


class Stats:
    """Totals; written by the engine loop, read between steps."""

    def __init__(self, num_ranks: int):
        self.steps = 0
        self.aborted = 0
        self.retractions = 0
        self.compiles_after_ready = 0
        self.loop_thread: int | None = None  # whose compilations are counted; None while nobody serves
        self.prompt_tokens = [0] * num_ranks
        self.cached_tokens = [0] * num_ranks
        self.generation_tokens = [0] * num_ranks
        self.finished = [0] * num_ranks
        self._recent: deque[tuple[float, list[int]]] = deque()
        self._now_s = 0.0

    def record(self, num_steps: int, new: list[int], outputs: Sequence[Output], now_s: float) -> None:
        """A launch is over. `new`: tokens of each rank; `outputs`: of requests that began, ended, or have
        more to tell than tokens."""
        self.steps += num_steps
        for output in outputs:
            if output.finish is not None:
                self.finished[output.dp_rank] += 1
                self.retractions += output.num_retractions
            if output.queue_time_s is not None:  # a request's first output
                self.prompt_tokens[output.dp_rank] += output.prompt_tokens
                self.cached_tokens[output.dp_rank] += output.cached_tokens
        for rank, count in enumerate(new):
            self.generation_tokens[rank] += count
        self._now_s = now_s
        self._recent.append((now_s, new))
        while self._recent[0][0] < now_s - WINDOW_S:
            self._recent.popleft()

    def throughput(self, rank: int) -> float:
        """Tokens a second over the last busy seconds; 0 while nothing runs."""
        if len(self._recent) < 2:
            return 0.0
        span = self._recent[-1][0] - self._recent[0][0]
        return sum(new[rank] for _, new in list(self._recent)[1:]) / span if span > 0 else 0.0

    def brief_loads(self, scheduler: Scheduler) -> list[RankLoad]:
        """What rides on the outputs."""
        return [
            RankLoad(
                len(rank.running),
                len(rank.waiting),
                rank.num_queued_tokens,
                round(rank.num_used_tokens / (rank.limits.num_pages * rank.limits.page_size), 4),
            )
            for rank in scheduler.ranks
        ]

    def loads(self, scheduler: Scheduler, info: Info, num_grammars: int = 0) -> list[dict[str, Any]]:
        """One dict a dp rank, with the keys of `/v1/loads`.

        `num_grammars`: requests whose grammar is not ready, told with the first rank, since they have none.
        """
        rows = []
        for i, rank in enumerate(scheduler.ranks):
            capacity = rank.limits.num_pages * rank.limits.page_size
            used, running, waiting = rank.num_used_tokens, len(rank.running), len(rank.waiting)
            prompt, cached = self.prompt_tokens[i], self.cached_tokens[i]
            rows.append(
                {
                    "dp_rank": i,
                    "num_running_reqs": running,
                    "num_waiting_reqs": waiting,
                    "num_waiting_uncached_tokens": rank.num_waiting_tokens,
                    "num_used_tokens": used,
                    "num_total_tokens": used + rank.num_waiting_tokens,
                    "num_cached_tokens": rank.tree.num_pages * rank.limits.page_size,
                    "max_total_num_tokens": capacity,
                    "max_running_requests": rank.limits.num_slots,
                    "token_usage": round(used / capacity, 4),
                    "gen_throughput": round(self.throughput(i), 2) if running else 0.0,
                    "cache_hit_rate": round(cached / prompt, 4) if prompt else 0.0,
                    "utilization": round(running / rank.limits.num_slots, 4),
                    "memory": {
                        "weight_gb": round(info.weight_bytes / 2**30, 3),
                        "kv_cache_gb": round(info.kv_cache_bytes / 2**30, 3),
                        "graph_gb": 0.0,
                        "token_capacity": capacity,
                    },
                    **({"speculative": speculative(rank.drafting)} if rank.drafter is not None else {}),
                    "queues": {
                        "waiting": waiting,
                        "grammar": num_grammars if i == 0 else 0,
                        "paused": 0,
                        "retracted": sum(1 for r in rank.waiting if r.num_retractions),
                    },
                }
            )
        return rows

    def snapshot(self, scheduler: Scheduler) -> dict[str, Any]:
        """Totals since the start. Lists have one entry a dp rank."""
        return {
            "steps": self.steps,
            "aborted": self.aborted,
            "retractions": self.retractions,
            "compiles_after_ready": self.compiles_after_ready,
            "prompt_tokens": list(self.prompt_tokens),
            "cached_tokens": list(self.cached_tokens),
            "generation_tokens": list(self.generation_tokens),
            "finished": list(self.finished),
            "requests": len(scheduler.requests),
            "spec_drafted": [rank.drafting.drafted for rank in scheduler.ranks],
            "spec_accepted": [rank.drafting.accepted for rank in scheduler.ranks],
        }


def speculative(drafting: Drafting) -> dict[str, float]:
    """Tokens of a decode step of a request, and the share of drafts that were right, since the start."""
    steps, drafted, accepted = drafting.steps, drafting.drafted, drafting.accepted
    return {
        "accept_length": round(1 + accepted / steps, 4) if steps else 0.0,
        "accept_rate": round(accepted / drafted, 4) if drafted else 0.0,
    }
