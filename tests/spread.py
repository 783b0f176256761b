"""How tests are spread over several pytest processes (`-n`): by the file, in the order collected.

A file's tests share engines, so they stay together. Two kinds go another way: tests of real servers, which
would get in each other's way, are all in one process, one after another; and the matrix of layouts, as
long as twenty other files, is spread by family.
"""

from xdist.scheduler import LoadScopeScheduling

PROCESSES = ("tests/e2e/", "tests/multihost/", "tests/router/test_router_processes.py")
MATRIX = "tests/parallel/test_engine_layouts.py"


class ByScope(LoadScopeScheduling):
    """Sends a scope of tests at a time to a process that has nearly run out of them."""

    def _split_scope(self, nodeid: str) -> str:
        return scope(nodeid)


def scope(nodeid: str) -> str:
    """The name of what runs in one process together with this test."""
    path, _, test = nodeid.partition("::")
    if path.startswith(PROCESSES):
        return "processes"
    if path == MATRIX and "[" in test:
        return f"{path}[{test.partition('[')[2].partition('-')[0]}]"
    return path
