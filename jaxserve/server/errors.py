"""The client's errors, and the one body they all have."""

from typing import Any

TYPE_OF_STATUS = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    499: "request_cancelled",
    500: "internal_server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class RequestError(Exception):
    """A request that gets an error answer: HTTP status, message, and the parameter at fault if one is."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        status: int = 400,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.message = message
        self.param = param
        self.status = status
        self.code = code
        self.headers = headers

    def body(self) -> dict[str, Any]:
        """OpenAI's error body."""
        return error_body(self.message, self.status, self.param, self.code)


def error_body(
    message: str, status: int, param: str | None = None, code: str | int | None = None
) -> dict[str, Any]:
    kind = TYPE_OF_STATUS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {
        "error": {
            "message": message,
            "type": kind,
            "param": param,
            "code": code if code is not None else status,
        }
    }


def unavailable(message: str, retry_after_s: int = 1) -> RequestError:
    """503: try again, here or at another replica."""
    return RequestError(message, status=503, headers={"retry-after": str(retry_after_s)})
