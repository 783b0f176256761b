"""Whatever a client sends, an application sees the same with `KnownHead` before the parser as without."""

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st
from uvicorn.server import ServerState

from router.config import RouterConfig
from router.http_server import ClientConnection
from router.known_head import KnownHead
from router.launch_router import uvicorn_config


class NoHead(KnownHead):
    """Knows nothing: all is for the parser."""

    def body_of(self, data):
        return None


class Transport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = False

    def write(self, data) -> None:
        self.written += data

    def close(self) -> None:
        self.closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class Application:
    """Notes scopes and bodies; every second data request goes the short way."""

    def __init__(self) -> None:
        self.seen = []

    def short_way(self, request) -> bool:
        if len(self.seen) % 2:
            return False
        self._note(request.scope, bytes(request.body))
        return request.answer(200, [(b"content-length", b"2")], b"ok")

    async def __call__(self, scope, receive, send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message["body"], message["more_body"]
        self._note(scope, body)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    def _note(self, scope, body: bytes) -> None:
        headers = [(n, int(v) if n == b"content-length" else v) for n, v in scope["headers"]]
        names = ("type", "method", "path", "raw_path", "query_string")
        self.seen.append(([scope[name] for name in names], headers, body))


async def settle() -> None:
    for _ in range(4):
        await asyncio.sleep(0)


async def conversation(pieces: list[bytes], known: KnownHead):
    """What the application saw and the client got, and whether the connection is open still."""
    app, transport = Application(), Transport()
    config = uvicorn_config(RouterConfig.from_keywords(worker_urls=["http://w:1"]), app)
    config.load()
    state = ServerState()
    state.draining = False  # type: ignore[attr-defined]
    connection = ClientConnection(config=config, server_state=state, app_state={})
    connection.connection_made(transport)
    connection.known = known
    for piece in pieces:
        if transport.closed:
            break
        connection.data_received(piece)
        await settle()
    closed = transport.closed
    connection.connection_lost(None)
    await settle()
    return app.seen, transport.written, closed


FINE = [
    b"Host: g", b"host: g", b"HOST:  g", b"Content-Type: application/json", b"X-A: 1", b"x-a:\t1 ",
    b"Authorization: Bearer a", b"Authorization: Bearer b", b"Expect: 100-continue", b"X: \xff",
    b"Connection: keep-alive", b"X-Length: 5", b"X: Content-Length: 5", b"X:", b"X-Long: " + b"y" * 4096,
]  # fmt: skip
UNUSUAL = [
    b"Connection: close", b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity", b"Upgrade: h2c",
    b"Content-Length: 5", b": x", b"X : y", b" folded", b"X: a\nY: b", b"X: \0",
]  # fmt: skip
LENGTH = b"Content-Length: %d"
LENGTHS = [
    b"content-length: %d", b"CONTENT-LENGTH: %d", b"Content-Length: 0%d", b"Content-Length:%d",
    b"Content-Length:  %d", b"Content-Length: %d ", b"Content-Length: +%d", b"Content-Length: -%d",
    b"Content-Length: 1_%d", b"Content-Length: 00000000000%d",
    b"Content-Length: -0", b"Content-Length: 2, %d",
]  # fmt: skip
START = b"POST /generate HTTP/1.1"
STARTS = [
    b"POST /v1/completions?a=b HTTP/1.1", b"POST /generate HTTP/1.0", b"GET /generate HTTP/1.1",
    b"POST /health HTTP/1.1", b"\r\nPOST /generate HTTP/1.1", b"post /generate HTTP/1.1",
]  # fmt: skip
fine, unusual, lengths, starts = map(st.sampled_from, (FINE, UNUSUAL, LENGTHS, STARTS))
bodies = st.sampled_from([b"", b"{}", b"12345", b"0\r\n\r\n", b"5\r\nhello\r\n0\r\n\r\n", b"a" * 300])


def message(head: list[bytes], body: bytes, error: int = 0) -> bytes:
    """`error`: what its length is wrong by."""
    return b"\r\n".join([*head, b"", b""]).replace(b"%d", b"%d" % max(0, len(body) + error)) + body


@st.composite
def variations(draw, head: list[bytes]):
    """`head` with one thing changed."""
    head = list(head)
    what = draw(st.sampled_from(["start", "length", "length", "length", "more", "unusual", "less"]))
    at = draw(st.integers(1, len(head)))
    if what == "start":
        head[0] = draw(starts)
    elif what == "length":
        head[head.index(LENGTH)] = draw(lengths)
    elif what == "less":
        del head[at:]
    else:
        head.insert(at, draw(fine if what == "more" else unusual))
    return head


@st.composite
def sequences(draw):
    """Pieces as they come from the socket: one head again and again, and what differs from it by little."""
    start = draw(st.just(START) | st.just(START) | starts)
    base = [start, *draw(st.lists(fine, max_size=1)), LENGTH, *draw(st.lists(fine, max_size=1))]
    pieces = []
    for _ in range(draw(st.integers(2, 3))):
        pieces.append(message(base, draw(bodies)))
    for _ in range(draw(st.integers(1, 5))):
        how = draw(st.sampled_from(["same", "other", "wrong", "cut", "late", "glued", "nested"]))
        head = draw(variations(base)) if how == "other" else base
        body = message(base, b"12") if how == "nested" else draw(bodies)
        data = message(head, body, draw(st.sampled_from([-1, 1])) if how == "wrong" else 0)
        if how == "cut":
            at = draw(st.integers(0, len(data)))
            pieces += [p for p in (data[:at], data[at:]) if p]
        elif how in ("late", "nested"):
            pieces += [data[: len(data) - len(body)], body] if body else [data]
        elif how == "glued":
            pieces[-1] += data
        else:
            pieces.append(data)
    return pieces


recognised = []


class Counting(KnownHead):
    def body_of(self, data):
        body = super().body_of(data)
        if body is not None:
            recognised.append(body)
        return body


@settings(max_examples=400, deadline=None)
@given(sequences())
def test_known_heads_change_nothing_that_an_application_or_a_client_sees(pieces):
    asyncio.run(compare(pieces))


async def compare(pieces: list[bytes]) -> None:
    assert await conversation(pieces, Counting()) == await conversation(pieces, NoHead())


def test_head_that_differs_by_little_from_a_known_one_is_what_the_parser_says_it_is():
    base = [START, b"Host: g", LENGTH, b"X-A: 1"]
    known = [message(base, body) for body in (b"{}", b"12345", b"{}")]
    heads = [base, [START, LENGTH], [START, b"Host: g", LENGTH], [START, b"Host: g", b"X-A: 1"]]
    heads += [[start, *base[1:]] for start in STARTS]
    heads += [[*base[:2], length, base[3]] for length in LENGTHS]
    heads += [[*base[:at], line, *base[at:]] for line in FINE + UNUSUAL for at in (1, 2, 3, 4)]
    for head in heads:
        for body in (b"", b"{}", b"12345"):
            for last in (message(base, b"{}"), message(head, body)):  # it may be the next known one
                pieces = [*known, *[message(head, body)] * 3, last]
                before = len(recognised)
                asyncio.run(compare(pieces))
                assert len(recognised) > before


def test_known_message_inside_a_body_is_not_a_message():
    inner = message([START, LENGTH], b"12")
    outer = message([START, LENGTH], inner)
    asyncio.run(compare([inner] * 3 + [outer[: -len(inner)], inner, inner, outer[:30], outer[30:], inner]))
