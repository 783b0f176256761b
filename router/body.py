"""The body of a request as it comes in, piece by piece."""

import asyncio
from typing import Any

from router.errors import RequestError

SILENT_S = 60.0  # for so long a client may send nothing of its body; as long as it may take nothing
LEAST_BYTES_S = 1000  # of a body, on average, once that time is over; any link brings more


async def next_part(receive, size: int, since_s: float) -> dict[str, Any]:
    """The next ASGI message of a body of which `size` bytes have come since the loop time `since_s`.

    Raises RequestError(408) when nothing more comes for SILENT_S, or the whole body drips: the time it has
    is SILENT_S and a second for every LEAST_BYTES_S that came.
    """
    end_s = min(asyncio.get_running_loop().time(), since_s + size / LEAST_BYTES_S) + SILENT_S
    try:
        async with asyncio.timeout_at(end_s):
            return await receive()
    except TimeoutError:
        text = (
            f"nothing more of the request's body came within {SILENT_S:g} s, "
            f"or less than {LEAST_BYTES_S} bytes a second on average"
        )
        raise RequestError(408, "body_timeout", text, headers=((b"connection", b"close"),)) from None
