"""Progress for the person who waits: bars in a terminal, a few lines in a log file."""

import logging
import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from jaxserve import messages

logger = logging.getLogger(__name__)


class ProgressLines:
    """Takes the engine's Progress messages; one bar or a quarter-wise line for each phase."""

    def __init__(self) -> None:
        self._bars: Progress | None = None
        if sys.stderr.isatty():
            columns = (
                TextColumn("{task.description:>16}"),
                BarColumn(),
                TextColumn("{task.percentage:3.0f} %"),
            )
            self._bars = Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True))
        self._tasks: dict[str, object] = {}
        self._told: dict[str, int] = {}

    def __call__(self, progress: messages.Progress) -> None:
        done, total = progress.done, max(progress.total, 1)
        if self._bars is None:
            quarter = done * 4 // total
            if quarter > self._told.get(progress.phase, -1):
                self._told[progress.phase] = quarter
                logger.info("%s: %d %%", progress.phase, done * 100 // total)
            return
        if progress.phase not in self._tasks:
            self._bars.start()
            self._tasks[progress.phase] = self._bars.add_task(progress.phase, total=total)
        self._bars.update(self._tasks[progress.phase], completed=done)  # type: ignore[arg-type]
        if all(task.finished for task in self._bars.tasks):
            self._bars.stop()
