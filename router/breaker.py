"""The circuit breaker of one worker: a pure state machine with an injected clock.

closed -(threshold failures in a row)-> open -(timeout)-> half_open, where one probe at a time is
admitted; enough good probes close it, a failed one opens it again with twice the timeout. Whoever is
admitted by `admit()` owes exactly one of `success()`, `failure()` or `forget()`, with the admission it got.
"""

from collections.abc import Callable
from typing import Literal

State = Literal["closed", "open", "half_open"]
Admission = int  # one of the three below
REFUSED: Admission = 0
NORMAL: Admission = 1
PROBE: Admission = 2
STATE_NUMBER: dict[State, int] = {"closed": 0, "open": 1, "half_open": 2}


class Breaker:
    """Times in seconds of the injected monotonic clock."""

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        failure_threshold: int = 5,
        success_threshold: int = 1,
        timeout_s: float = 1.0,
        timeout_max_s: float = 30.0,
        enabled: bool = True,
        on_change: Callable[[State, State], None] | None = None,
    ) -> None:
        self.clock = clock
        self.failure_threshold = failure_threshold
        self.success_threshold = success_threshold
        self.first_timeout_s = timeout_s
        self.timeout_max_s = max(timeout_s, timeout_max_s)
        self.enabled = enabled
        self.on_change = on_change or (lambda old, new: None)
        self.state: State = "closed"
        self.failures = 0  # in a row while closed
        self.successes = 0  # in a row while half open
        self.timeout_s = timeout_s
        self.opened_at = 0.0
        self.probing = False

    @property
    def closed(self) -> bool:
        return self.state == "closed"

    def probe_due(self) -> bool:
        """Whether `admit()` would let one probe through now; changes nothing."""
        if self.state == "open":
            return self.clock() - self.opened_at >= self.timeout_s
        return self.state == "half_open" and not self.probing

    def admit(self) -> Admission:
        """Whether a request may go to the worker now. In half_open the caller becomes the one probe."""
        if self.state == "closed":
            return NORMAL
        if not self.probe_due():
            return REFUSED
        if self.state == "open":
            self.successes = 0
            self._go("half_open")
        self.probing = True
        return PROBE

    def success(self, admission: Admission) -> None:
        if admission == PROBE:
            self.probing = False
            self.successes += 1
            if self.successes >= self.success_threshold:
                self.reset()
        elif self.state == "closed":
            self.failures = 0

    def failure(self, admission: Admission, weight: int = 1) -> None:
        """Count `weight` failures. What was admitted before the breaker opened changes nothing after."""
        if admission == PROBE:
            self.timeout_s = min(self.timeout_s * 2, self.timeout_max_s)
            self._open()
        elif self.state == "closed" and self.enabled:
            self.failures += weight
            if self.failures >= self.failure_threshold:
                self._open()

    def forget(self, admission: Admission) -> None:
        """The admitted request ended without saying anything of the worker (the client left)."""
        if admission == PROBE:
            self.probing = False

    def reset(self) -> None:
        """Close, as if new."""
        self.failures = self.successes = 0
        self.timeout_s = self.first_timeout_s
        self.probing = False
        self._go("closed")

    def _open(self) -> None:
        self.failures = 0
        self.probing = False
        self.opened_at = self.clock()
        self._go("open")

    def _go(self, new: State) -> None:
        old, self.state = self.state, new
        if old != new:
            self.on_change(old, new)
