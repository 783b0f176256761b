"""How a worker is chosen: one file a policy, found by name."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib import import_module
from random import Random  # the name `random` here is the policy of that name
from typing import Any

from router.call import Call
from router.config import RouterConfig
from router.workers import Worker


class Policy(ABC):
    """Chooses among usable workers. Runs on the event loop; no I/O, no waiting.

    For each attempt the proxy calls `choose`, then `placed`; `learned` when the worker said how many
    prompt tokens it had cached. `reads_prompt`: whether `Call.prompt` must be filled.
    """

    reads_prompt = False
    orders = False  # `uncached` is known, so that waiting streams can be put in order

    def __init__(self, config: RouterConfig, rng: Random) -> None:
        self.config = config
        self.rng = rng

    @abstractmethod
    def choose(self, call: Call, workers: Sequence[Worker]) -> Worker:
        """One of `workers`, which is not empty. Sets `call.decision`, maybe `call.predicted_tokens`."""

    def placed(self, call: Call, worker: Worker) -> None:
        """The request is being sent to `worker`."""

    def uncached(self, call: Call, worker: Worker) -> float:
        """Prompt tokens that `worker` would have to compute, by what is known now."""
        return call.prompt_tokens

    def prefilled(self, call: Call, worker: Worker) -> None:
        """The first output of the request has come from `worker`, or it ended without one."""

    def learned(self, call: Call, worker: Worker, prompt_tokens: int, cached_tokens: int) -> None:
        """`worker` computed the prompt and said how many of its tokens were cached."""

    def cleared(self, worker: Worker) -> None:
        """`worker` lost its cache: it was flushed or restarted."""

    def forget(self, worker: Worker) -> None:
        """`worker` is gone for good."""
        self.cleared(worker)

    def news(self, call: Call, worker: Worker) -> Any:
        """What other gateway processes should know of `placed`, as plain data; None: nothing."""
        return None

    def heard(self, worker: Worker, news: Any) -> None:
        """Another gateway process placed a request at `worker`, and told `news` of it."""

    def sweep(self, now_s: float) -> None:
        """Periodic upkeep, every `eviction_interval_secs`."""

    def stats(self) -> dict[str, float]:
        """Numbers for metrics, such as `tree_chars`."""
        return {}


def least_loaded(workers: Sequence[Worker]) -> Worker:
    """Fewest in-flight requests, then fewest ever, then the first."""
    return min(workers, key=lambda w: (w.requests, w.total))


def make_policy(name: str, config: RouterConfig, rng: Random | None = None) -> Policy:
    """The policy called `name`, one of `router.config.POLICIES`."""
    module = import_module(f"router.policies.{name}")
    class_name = "".join(part.capitalize() for part in name.split("_"))
    return getattr(module, class_name)(config, rng or Random())
