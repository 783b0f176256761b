"""The body of a request to the gateway itself."""

import asyncio

from router.body import next_part
from router.errors import RequestError

MAX_CONTROL_BYTES = 1 << 20


async def control_body(receive) -> bytes:
    """All of it. Raises RequestError, also to end the request of a client that left."""
    body, since_s = bytearray(), asyncio.get_running_loop().time()
    while True:
        message = await next_part(receive, len(body), since_s)
        if message["type"] == "http.disconnect":
            raise RequestError(499, "client_left", "the client left before its request was complete")
        body += message.get("body", b"")
        if len(body) > MAX_CONTROL_BYTES:
            limit = f"the body of a control request exceeds {MAX_CONTROL_BYTES} bytes"
            raise RequestError(413, "payload_too_large", limit)
        if not message.get("more_body"):
            return bytes(body)
