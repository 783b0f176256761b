"""Frames between the processes of one gateway: a length, a kind, and a MessagePack payload.

Over the two ends of a socket pair; ordered and whole. Knows nothing of what the frames mean.
"""

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import Any

import msgspec

HEADER = struct.Struct("<IB")
NEWS_BUFFER_BYTES = 4 << 20  # a reader that lags further behind misses news; loads are sent again anyway

# Kinds. From the supervisor: CONFIG, STATE, CLEARED, ANSWER, COUNT, GONE; from a member: READY, ASK,
# COUNTED; passed on to every other member: LOADS, NEWS. PING asks for PONG.
CONFIG, READY, STATE, CLEARED, LOADS, NEWS, GONE, ASK, ANSWER, COUNT, COUNTED, PING, PONG = range(13)


class Link(asyncio.Protocol):
    """One end. `on_frame(kind, payload)` takes undecoded payloads; `on_lost()` is called once."""

    def __init__(self, on_frame: Callable[[int, bytes], None], on_lost: Callable[[], None]) -> None:
        self.on_frame = on_frame
        self.on_lost = on_lost
        self.data = bytearray()
        self.transport: asyncio.Transport = None  # type: ignore[assignment]

    @classmethod
    async def open(
        cls, sock: socket.socket, on_frame: Callable[[int, bytes], None], on_lost: Callable[[], None]
    ) -> "Link":
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        _, link = await loop.create_connection(lambda: cls(on_frame, on_lost), sock=sock)
        return link

    def send(self, kind: int, value: Any) -> None:
        self.send_raw(kind, msgspec.msgpack.encode(value))

    def send_raw(self, kind: int, payload: bytes) -> None:
        if self.transport.is_closing():
            return
        if kind == NEWS and self.transport.get_write_buffer_size() > NEWS_BUFFER_BYTES:
            return
        self.transport.write(HEADER.pack(len(payload), kind) + payload)

    def close(self) -> None:
        self.transport.close()

    def connection_made(self, transport) -> None:  # type: ignore[override]
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        buffer = self.data
        buffer += data
        at = 0
        while len(buffer) - at >= HEADER.size:
            size, kind = HEADER.unpack_from(buffer, at)
            end = at + HEADER.size + size
            if len(buffer) < end:
                break
            payload = bytes(buffer[at + HEADER.size : end])
            at = end
            self.on_frame(kind, payload)
        del buffer[:at]

    def connection_lost(self, exc: Exception | None) -> None:
        self.on_lost()
