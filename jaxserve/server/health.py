"""`GET /health` and nothing else: for hosts that serve no requests."""

import asyncio
import contextlib

READ_TIMEOUT_S = 5.0


async def start_health_server(host: str, port: int) -> asyncio.Server:
    """Answer 200 from now on until the server is closed. Raises OSError when it cannot listen."""
    return await asyncio.start_server(_answer, host, port, limit=8192)


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        request = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), READ_TIMEOUT_S)
        healthy = request.startswith((b"GET /health ", b"HEAD /health "))
        status, body = ("200 OK", "OK") if healthy else ("404 Not Found", "no route but GET /health")
        head = f"HTTP/1.1 {status}\r\ncontent-type: text/plain\r\ncontent-length: {len(body)}\r\n"
        writer.write((head + "connection: close\r\n\r\n").encode())
        if not request.startswith(b"HEAD"):
            writer.write(body.encode())
        await writer.drain()
    writer.close()
