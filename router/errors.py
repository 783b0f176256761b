"""What a client is told when the gateway itself must answer: one OpenAI error shape everywhere."""

import msgspec

JSON = (b"content-type", b"application/json")


class RequestError(Exception):
    """A request that the gateway answers itself.

    `status` is the HTTP status, `code` and `type` are the fields of the OpenAI error body, `param` names
    the offending field, `retry_after_s` becomes a Retry-After header (whole seconds, at least 1).
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.type = type or ("invalid_request_error" if status < 500 else "server_error")
        self.param = param
        self.retry_after_s = retry_after_s
        self.headers = headers

    def body(self) -> bytes:
        return error_body(self.message, self.type, self.code, self.param)

    def response_headers(self) -> list[tuple[bytes, bytes]]:
        """Everything but content-length."""
        headers = [JSON, (b"x-smg-error-code", self.code.encode()), *self.headers]
        if self.retry_after_s is not None:
            headers.append((b"retry-after", b"%d" % max(1, round(self.retry_after_s))))
        return headers


def error_body(message: str, type: str, code: str, param: str | None = None) -> bytes:
    """`{"error": {"message", "type", "code", "param"}}` as JSON."""
    return msgspec.json.encode({"error": {"message": message, "type": type, "code": code, "param": param}})


async def send_error(send, error: RequestError, request_id: bytes | None = None) -> None:
    """Send the whole answer over ASGI `send`."""
    body = error.body()
    headers = [*error.response_headers(), (b"content-length", b"%d" % len(body))]
    if request_id is not None:
        headers.append((b"x-request-id", request_id))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def stream_error_event(path: str, message: str, code: str = "stream_error") -> bytes:
    """The server-sent event that ends a broken stream, in the protocol of the client's route."""
    if path == "/v1/messages":
        body = msgspec.json.encode({"type": "error", "error": {"type": "api_error", "message": message}})
        return b"event: error\ndata: " + body + b"\n\n"
    if path == "/v1/responses":
        body = msgspec.json.encode({"type": "error", "code": code, "message": message, "param": None})
        return b"event: error\ndata: " + body + b"\n\n"
    return b"data: " + error_body(message, "server_error", code) + b"\n\n"
