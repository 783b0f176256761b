"""cache_aware_threshold: SGLang's rule. Follow the longest known prefix, unless load is unbalanced.

1. In-flight requests differ by more than `balance_abs_threshold` and the fullest worker has more than
   `balance_rel_threshold` times those of the emptiest: the least loaded.
2. The matched share of the prompt exceeds `cache_threshold`: the worker that was sent it last.
3. Else the least loaded.
"""

import random
from collections.abc import Sequence
from typing import Any

from router.call import Call
from router.config import RouterConfig
from router.policies import Policy, least_loaded
from router.prefix_tree import PrefixTree
from router.workers import Worker


def or_default(value, default):
    return default if value is None else value


class CacheAwareThreshold(Policy):
    reads_prompt = True

    def __init__(self, config: RouterConfig, rng: random.Random) -> None:
        super().__init__(config, rng)
        self.threshold = or_default(config.cache_threshold, 0.5)
        self.abs_threshold = or_default(config.balance_abs_threshold, 32)
        self.rel_threshold = or_default(config.balance_rel_threshold, 1.5)
        self.tree = PrefixTree(config.max_tree_size)

    def choose(self, call: Call, workers: Sequence[Worker]) -> Worker:
        loads = [w.requests for w in workers]
        low, high = min(loads), max(loads)
        if high - low > self.abs_threshold and high > self.rel_threshold * low:
            call.decision = "unbalanced"
            return least_loaded(workers)
        text = call.prompt_text()
        matched, worker = self.tree.match(text, workers)
        if isinstance(worker, Worker) and matched > self.threshold * len(text):
            call.decision = "prefix"
            call.predicted_tokens = matched * call.prompt_tokens // max(1, len(text))
            return worker
        call.decision = "no_prefix"
        return least_loaded(workers)

    def placed(self, call: Call, worker: Worker) -> None:
        self.tree.insert(call.prompt_text(), worker)

    def news(self, call: Call, worker: Worker) -> Any:
        return call.prompt_text()

    def heard(self, worker: Worker, news: Any) -> None:
        self.tree.insert(news, worker)

    def cleared(self, worker: Worker) -> None:
        self.tree.remove(worker)

    def sweep(self, now_s: float) -> None:
        self.tree.evict(self.config.max_tree_size)

    def stats(self) -> dict[str, float]:
        return {"tree_chars": self.tree.total_chars, "tree_nodes": self.tree.num_nodes}
