"""What a process logs: its own words from `--log-level` up, a library's when something is wrong."""

import atexit
import logging
import os
import sys


def start_logging(name: str, level: str) -> None:
    """Log to stderr under the process's `name`. Level debug is for libraries too.

    At exit, what stdout and stderr still hold and cannot be written, as on a full disk, is dropped:
    Python would end with status 120 instead of the program's.
    """
    own = logging.getLevelNamesMapping()[level.upper()]
    logging.basicConfig(
        level=own if own == logging.DEBUG else max(own, logging.WARNING),
        format=f"%(asctime)s {name} %(levelname)s %(name)s: %(message)s",
    )
    logging.getLogger("jaxserve").setLevel(own)
    atexit.register(_drop_unwritten_output)


def _drop_unwritten_output() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())  # Python's own flush comes after this
            os.close(nowhere)
