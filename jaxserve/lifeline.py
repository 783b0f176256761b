"""The lifeline between a launcher and its engine process: a socket pair, by which either misses the other.

It is the engine's standard input. The first line is the configuration; after it both ends send
`beat` every second, and now and then a line that says more. When one end closes, the other process
knows at once that its partner died; when the beats stop, that it is frozen. Threads carry it, so
that a long computation or a busy event loop is not taken for a frozen process.
"""

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable

BEAT_S = 1.0
BEAT = "beat"


class Lifeline:
    """One end.

    Args:
        heard: called with every line that is no beat, from the lifeline's thread.
        lost: called once with what happened, when the other end closed or, with `silence_s`, fell silent.
    """

    def __init__(self, sock: socket.socket):
        self._sock = sock
        self._sock.setblocking(False)
        self._data = b""

    def first_line(self) -> str:
        """Wait for a line; only before `start`. Raises EOFError."""
        while b"\n" not in self._data:
            select.select([self._sock], [], [])
            if not (part := self._sock.recv(65536)):
                raise EOFError("the launcher is gone")
            self._data += part
        line, self._data = self._data.split(b"\n", 1)
        return line.decode()

    def start(
        self, heard: Callable[[str], None], lost: Callable[[str], None], silence_s: float | None
    ) -> None:
        threading.Thread(target=self._run, args=(heard, lost, silence_s), daemon=True).start()

    def say(self, line: str) -> None:
        """Never waits: a partner who does not read is missed by its beats anyway."""
        with contextlib.suppress(OSError):
            self._sock.send(" ".join(line.split("\n")).encode() + b"\n")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def _run(
        self, heard: Callable[[str], None], lost: Callable[[str], None], silence_s: float | None
    ) -> None:
        heard_s = said_s = time.monotonic()
        while True:
            ready = select.select([self._sock], [], [], BEAT_S)[0]
            now_s = time.monotonic()
            if ready:  # read before judging: after a pause of this process, beats wait here
                try:
                    part = self._sock.recv(65536)
                except OSError:
                    part = b""
                if not part:
                    return lost("closed")
                heard_s = now_s
                self._data += part
            *lines, self._data = self._data.split(b"\n")
            for line in lines:
                if line != BEAT.encode():
                    heard(line.decode())
            if silence_s is not None and now_s - heard_s > silence_s:
                return lost(f"silent for {now_s - heard_s:.0f} s")
            if now_s - said_s >= BEAT_S / 2:
                said_s = now_s
                self.say(BEAT)
