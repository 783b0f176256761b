"""The body of a request as it comes in, piece by piece."""

import asyncio
from typing import Any

from router.errors import RequestError

SILENT_S = 60.0  # for so long a client may send nothing of its body; as long as it may take nothing


async def next_part(receive) -> dict[str, Any]:
    """The next ASGI message. Raises RequestError(408) when the client sends nothing more."""
    try:
        async with asyncio.timeout(SILENT_S):
            return await receive()
    except TimeoutError:
        text = f"nothing of the request's body came within {SILENT_S:g} s"
        raise RequestError(408, "body_timeout", text, headers=((b"connection", b"close"),)) from None
