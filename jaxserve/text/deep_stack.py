"""Room for the grammar library's recursion.

It is native code that reads by recursion, and a stack that overflows ends the process. A level of a JSON
schema takes 5.5 KB of it, one of an EBNF grammar 2 KB (llguidance 1.9.1), and what the bounds on length let
through never takes a fifth of STACK_BYTES.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

STACK_BYTES = 256 * 2**20  # reserved, and not memory until it is used
_lock = threading.Lock()


def start_deep[T](function: Callable[..., T], *args: Any) -> Future[T]:
    """Call the function in a thread with a large stack. The process does not wait for it at its end."""
    done: Future[T] = Future()

    def work() -> None:
        try:
            done.set_result(function(*args))
        except BaseException as error:  # a panic of the library is no Exception
            done.set_exception(error)

    done.set_running_or_notify_cancel()  # from now on nobody can cancel it
    with _lock:
        before = threading.stack_size(STACK_BYTES)  # of threads that start from now on
        try:
            threading.Thread(target=work, name="deep", daemon=True).start()
        finally:
            threading.stack_size(before)
    return done


def run_deep[T](function: Callable[..., T], *args: Any) -> T:
    """`start_deep`, and wait for what it returns or raises."""
    return start_deep(function, *args).result()
