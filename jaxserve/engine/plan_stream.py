"""The ordered stream between host 0 and a follower: its messages, its frames, and its chain of hashes.

A frame is a length (4 bytes, big-endian) and one msgpack message; nothing is pickled. Everything
that starts a device program on host 0 goes out as a Plan first. Plans are numbered, and each digest
covers every plan before it, so that a follower that missed or misread one cannot go on unnoticed.
Knows sockets, and nothing of jax.
"""

import contextlib
import socket
import struct
import threading
import time

import msgspec
import xxhash

MAX_FRAME_BYTES = 64 * 2**20  # the packed step of 64 ranks with 8,192 prefill tokens each has 16 MiB


class StreamError(RuntimeError):
    """The stream broke off or carried what it must not; the message says which and where."""


class Launch(msgspec.Struct, frozen=True, array_like=True):
    """One device program to start: its number in the runner's list, and its packed int32 argument."""

    program: int
    packed: bytes


class Hello(msgspec.Struct, frozen=True, tag=True):
    """A follower's first message."""

    rank: int
    facts: dict[str, str]


class Facts(msgspec.Struct, frozen=True, tag=True):
    """What a follower knows at a stage of the start: what must be equal, and what the least counts of."""

    stage: str
    same: dict[str, str]
    least: dict[str, int]


class Verdict(msgspec.Struct, frozen=True, tag=True):
    """Host 0's answer once every host has come to the stage; `refusal` ends the start."""

    stage: str
    refusal: str | None = None
    least: dict[str, int] = {}


class Program(msgspec.Struct, frozen=True, tag=True):
    """A part of a compiled program as host 0's cache holds it: the file's name, content from byte `begin` on,
    and how many bytes are left."""

    file: str
    content: bytes
    begin: int = 0
    left: int = 0


class Plan(msgspec.Struct, frozen=True, tag=True):
    """What to launch, in order."""

    number: int
    launches: list[Launch]
    digest: int


class Beat(msgspec.Struct, frozen=True, tag=True):
    """A sign of life."""


class Leave(msgspec.Struct, frozen=True, tag=True):
    """A follower was told to stop and asks that all do."""


class End(msgspec.Struct, frozen=True, tag=True):
    """The sender ends now, and so must the instance. Not `clean`: something failed, as `reason` says."""

    reason: str
    clean: bool = False


Message = Hello | Facts | Verdict | Program | Plan | Beat | Leave | End

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Message).decode


class Chain:
    """Numbers plans and hashes them, or checks that they come so."""

    def __init__(self) -> None:
        self.number = 0
        self._digest = 0

    def seal(self, launches: list[Launch]) -> Plan:
        self.number += 1
        self._digest = _chained(self._digest, self.number, launches)
        return Plan(self.number, launches, self._digest)

    def check(self, plan: Plan) -> None:
        """Raises StreamError unless this is the next plan, unchanged."""
        if plan.number != self.number + 1:
            raise StreamError(f"plan {plan.number} came, expected {self.number + 1}")
        digest = _chained(self._digest, plan.number, plan.launches)
        if plan.digest != digest:
            raise StreamError(f"plan {plan.number} has digest {plan.digest:016x}, expected {digest:016x}")
        self.number, self._digest = plan.number, digest


def _chained(before: int, number: int, launches: list[Launch]) -> int:
    hashed = xxhash.xxh3_64(struct.pack(">QQ", before, number))
    for launch in launches:
        hashed.update(struct.pack(">II", launch.program, len(launch.packed)))
        hashed.update(launch.packed)
    return hashed.intdigest()


class Peer:
    """The other end of a connection; `send` may be called from any thread, `receive` from one.

    `last_heard_s` is the clock's time at which something came last.
    """

    def __init__(self, sock: socket.socket, name: str, send_timeout_s: float):
        self.name = name
        self.last_heard_s = time.monotonic()
        self._sock = sock
        self._sending = threading.Lock()
        sock.settimeout(None)
        # Not settimeout, which would bound receiving too.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(send_timeout_s), 0))
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, message: Message) -> None:
        """Raises StreamError when the peer is gone or takes nothing."""
        frame = encode_frame(message)
        with self._sending:
            self._send(frame)

    def beat(self) -> None:
        """A sign of life, unless something is being sent anyway. Raises StreamError."""
        if self._sending.acquire(blocking=False):
            try:
                self._send(encode_frame(Beat()))
            finally:
                self._sending.release()

    def _send(self, frame: bytes) -> None:
        try:
            self._sock.sendall(frame)
        except OSError as error:
            raise StreamError(f"{self.name} cannot be reached: {error.strerror or error}") from error

    def receive(self) -> Message:
        """Wait for the next message. Raises StreamError."""
        head = self._read(4, 4)
        size = int.from_bytes(head, "big")
        if size > MAX_FRAME_BYTES:
            raise StreamError(f"{self.name} announced {size} bytes; at most {MAX_FRAME_BYTES} are taken")
        body = self._read(size, size)
        try:
            return _decode(body)
        except msgspec.MsgspecError as error:
            raise StreamError(f"{self.name} sent what is no message: {error}") from error

    def _read(self, size: int, of: int) -> bytearray:
        data = bytearray(size)
        view, at = memoryview(data), 0
        while at < size:
            try:
                count = self._sock.recv_into(view[at:])
            except OSError as error:
                raise StreamError(f"{self.name} is gone: {error.strerror or error}") from error
            if not count:
                where = f" after {at} of {of} bytes of a message" if at or size != 4 else ""
                raise StreamError(f"{self.name} closed the connection{where}")
            at += count
            self.last_heard_s = time.monotonic()
        return data

    def close(self) -> None:
        """Wakes a thread in `receive`."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


def encode_frame(message: Message) -> bytes:
    body = _encode(message)
    assert len(body) <= MAX_FRAME_BYTES, f"a message of {len(body)} bytes exceeds {MAX_FRAME_BYTES}"
    return len(body).to_bytes(4, "big") + body
