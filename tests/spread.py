"""How tests are spread over several pytest processes (`-n`): by the file, in the order collected.

A file's tests share engines, so they stay together. Two kinds go another way: tests of real servers, which
would get in each other's way, are all in one process, one after another; and the matrix of layouts, as
long as twenty other files, is spread by family.
"""

from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

PROCESSES = ("tests/e2e/", "tests/multihost/", "tests/router/test_router_processes.py")
MATRIX = "tests/parallel/test_engine_layouts.py"


class ByScope(LoadScopeScheduling):
    """Sends a scope of tests at a time to a process that has nearly run out of them.

    A test that ends its process fails, and the rest of its scope runs in another one. xdist's own way
    would run that test again, and wait for ever where it is all that is left (3.8).
    """

    def _split_scope(self, nodeid: str) -> str:
        return scope(nodeid)

    def remove_node(self, node: WorkerController) -> str | None:
        """The test that a process was at when it ended; None: it had none left."""
        units = self.assigned_work.pop(node)
        left = [(name, test) for name, unit in units.items() for test, done in unit.items() if not done]
        if not left:
            return None
        name, ended_by = left[0]
        units[name][ended_by] = True
        self.workqueue.update({name: unit for name, unit in units.items() if not all(unit.values())})
        for other in self.nodes:
            self._reschedule(other)
        return ended_by

    def _reschedule(self, node: WorkerController) -> None:
        """A process begins a test when it knows the next, or that none follows: it must not have only one."""
        super()._reschedule(node)
        while not node.shutting_down and self._pending_of(self.assigned_work[node]) < 2:
            super()._reschedule(node)


def scope(nodeid: str) -> str:
    """The name of what runs in one process together with this test."""
    path, _, test = nodeid.partition("::")
    if path.startswith(PROCESSES):
        return "processes"
    if path == MATRIX and "[" in test:
        return f"{path}[{test.partition('[')[2].partition('-')[0]}]"
    return path
