"""What the experts of a served model have to do, and which of them should be where.

Counts by layer and device, records for a client who asks, and balancing between steps: hot experts
get copies, and devices even load. Answers do not depend on it.
"""

from collections import deque
from typing import Any

import numpy as np

from jaxserve.engine.runner import Runner
from jaxserve.parallel.placement import Placement, rebalance_layer

LEAST_GAIN = 0.01  # of balancedness, for which experts are moved


class ExpertWatch:
    """Of a runner whose model has experts. Used by the engine's loop alone, between steps."""

    def __init__(self, runner: Runner):
        assert runner.experts is not None, "a dense model has no experts"
        self._runner, self._state = runner, runner.experts
        spec = self._state.spec
        self.num_rebalances = 0
        self.num_moved = 0  # slots that got another expert
        self.device_tokens = np.zeros(self._state.placement.num_devices)
        self._seen_LE = np.zeros((spec.num_layers, spec.num_experts), np.uint64)
        self._window_from_LE = self._seen_LE  # totals when the last balancing began
        self._steps = 0
        self._load_LE = self._seen_LE  # what the balancing under way is for
        self._due: deque[int] = deque()  # its layers
        self._record_from_LE: np.ndarray | None = None
        self._record_LE: np.ndarray | None = None  # of a record that was stopped

    def read(self) -> np.ndarray:
        """Tokens that chose each expert since the start, [L, E]; waits for the launched steps.

        What came since the last read is booked on the devices that hold the experts now, copies
        sharing it evenly.
        """
        total_LE = self._runner.expert_load()
        self.device_tokens += self._state.placement.device_load(total_LE - self._seen_LE).sum(axis=0)
        self._seen_LE = total_LE
        return total_LE

    # ---- balancing ----

    def before_steps(self, num_steps: int) -> None:
        """Some are about to be launched: begin a balancing, or go on with one, when it is time."""
        balancing = self._state.balancing
        if balancing is None:
            return
        self._steps += num_steps
        if self._steps > balancing.num_steps and not self._due:
            self._begin()
            self._steps = num_steps
        layers = [self._due.popleft() for _ in range(min(balancing.layers_at_once, len(self._due)))]
        moves = {layer: experts for layer in layers if (experts := self._better(layer)) is not None}
        before = self._state.placement
        self._runner.move_experts(moves)
        changed = self._state.placement.logical_LP != before.logical_LP
        self.num_moved += int(changed.sum())

    def _begin(self) -> None:
        total_LE = self.read()
        self._load_LE, self._window_from_LE = total_LE - self._window_from_LE, total_LE
        self._due = deque(np.flatnonzero(self._load_LE.any(axis=1)).tolist())
        self.num_rebalances += 1

    def _better(self, layer: int) -> np.ndarray | None:
        """Experts of a layer's slots that even the load out, unless they are nearly as good as they are."""
        load_E, placement = self._load_LE[layer], self._state.placement
        before_P = placement.logical_LP[layer]
        after_P = rebalance_layer(load_E, before_P, placement.num_devices)
        before, after = (
            Placement(logical_P[None], placement.num_devices).balance(load_E[None])[0]
            for logical_P in (before_P, after_P)
        )
        return after_P if after > before + LEAST_GAIN else None

    # ---- what is told ----

    def snapshot(self) -> dict[str, Any]:
        """For the engine's statistics.

        balancedness: mean over largest device load of each layer, since the last balancing began.
        """
        total_LE = self.read()
        balance_L = self._state.placement.balance(total_LE - self._window_from_LE)
        return {
            "balancedness": np.round(balance_L, 4).tolist(),
            "device_tokens": np.round(self.device_tokens).tolist(),
            "rebalances": self.num_rebalances,
            "moved": self.num_moved,
        }

    def start_record(self) -> None:
        """Forgets an earlier record."""
        self._record_from_LE, self._record_LE = self.read(), None

    def stop_record(self) -> None:
        """Raises ValueError when none runs."""
        if self._record_from_LE is None or self._record_LE is not None:
            raise ValueError("no expert distribution record runs; start one")
        self._record_LE = self.read() - self._record_from_LE

    def dump_record(self) -> dict[str, Any]:
        """The record, stopped or still running, and where experts are. Raises ValueError without one."""
        if self._record_from_LE is None:
            raise ValueError("no expert distribution record was started")
        running = self._record_LE is None
        count_LE = self.read() - self._record_from_LE if self._record_LE is None else self._record_LE
        return {
            "recording": running,
            "logical_count": count_LE.tolist(),
            "physical_to_logical_map": self._state.placement.logical_LP.tolist(),
            "num_devices": self._state.placement.num_devices,
        }
