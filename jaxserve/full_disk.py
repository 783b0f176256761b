"""Ending well although what was logged could not be written."""

import atexit
import os
import sys


def forget_unwritten_output() -> None:
    """At exit, drop what stdout and stderr still hold when it cannot be written, as on a full disk.

    Python would end with status 120 instead of the program's.
    """
    atexit.register(_drop)


def _drop() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())  # Python's own flush comes after this
            os.close(nowhere)
