"""An LLM worker for tests, on the test's own event loop: the HTTP surface, a toy cache, and faults.

Its model echoes: token i of the answer is `tok{i} `. `cached_tokens` is the longest common prefix with
any earlier prompt in whole pages of 16 tokens of 4 characters.
"""

import asyncio
import json
import ssl
from dataclasses import dataclass, field
from typing import Any

PAGE_CHARS = 64
HANG_UP = -1.0  # in a script


@dataclass
class Seen:
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Faults:
    status: int | None = None  # every data request is answered with it
    retry_after: str | None = None
    health: int = 200
    drop: bool = False  # close without an answer
    abort_after: int | None = None  # break streams after so many events
    half_event: bool = False  # break them inside an event
    delay_s: float = 0.0  # before the answer's head
    token_s: float = 0.0  # between tokens
    body_after_s: float = 0.0  # between the head and the body of a whole answer
    frozen: bool = False  # accept and read, answer nothing
    garbage: bool = False  # answer what is not HTTP
    body: bytes | None = None  # every data request is answered 200 with it
    cut_body: bool = False  # announce more bytes than are sent
    script: tuple[bytes | float, ...] = ()  # bytes that are every answer, and pauses; HANG_UP at the end


@dataclass
class MockWorker:
    model: str = "mock"
    name: str = "worker"
    port: int = 0
    info: dict[str, Any] = field(default_factory=dict)
    response_headers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.faults = Faults()
        self.seen: list[Seen] = []
        self.scheme = "http"
        self.probes = 0
        self.flushes = 0
        self.running = 0
        self.disconnects: list[float] = []  # loop time at which a client was seen to leave
        self.prompts: list[str] = []
        self.server: asyncio.Server | None = None
        self.writers: set[asyncio.StreamWriter] = set()
        self.thawed = asyncio.Event()

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    async def start(self, tls: ssl.SSLContext | None = None) -> "MockWorker":
        self.scheme = "https" if tls else "http"
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=tls)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def kill(self) -> None:
        """What SIGKILL looks like from outside: the port refuses, connections are reset."""
        assert self.server is not None
        self.server.close()
        for writer in list(self.writers):
            writer.transport.abort()
        self.prompts.clear()
        await asyncio.sleep(0)

    def thaw(self) -> None:
        self.faults.frozen = False
        self.thawed.set()
        self.thawed = asyncio.Event()

    # ---- HTTP ----

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.add(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                line, *rest = head.decode("latin-1").split("\r\n")
                method, target, _ = line.split(" ")
                headers = {}
                for item in rest:
                    if item:
                        name, _, value = item.partition(":")
                        headers[name.lower()] = value.strip()
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                if self.faults.frozen:
                    await self.thawed.wait()
                if not await self._answer(method, target, headers, body, reader, writer):
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            self.writers.discard(writer)
            writer.close()

    async def _answer(self, method, target, headers, body, reader, writer) -> bool:
        path = target.partition("?")[0]
        control = self._control(path)
        if control is not None:
            status, value = control
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            await self._send(writer, status, data)
            return True
        self.seen.append(Seen(path, headers, body))
        faults = self.faults
        if faults.garbage:
            writer.write(b"SSH-2.0-OpenSSH_9.6\r\n")
            return False
        if faults.drop:
            writer.transport.abort()
            return False
        for part in faults.script:
            if isinstance(part, bytes):
                writer.write(part)
            elif part == HANG_UP:
                return False
            else:
                await asyncio.sleep(part)
        if faults.script:
            return True
        gone = asyncio.ensure_future(reader.read(1))
        self.running += 1
        try:
            if faults.delay_s and await self._left(gone, faults.delay_s):
                return False
            if faults.status is not None:
                extra = {"retry-after": faults.retry_after} if faults.retry_after else {}
                error = {"error": {"message": "injected", "type": "server_error", "code": None}}
                await self._send(writer, faults.status, json.dumps(error).encode(), extra)
                return True
            if faults.body is not None:
                await self._send(writer, 200, faults.body)
                return True
            return await self._generate(path, headers, body, gone, writer)
        finally:
            self.running -= 1
            if not gone.done():
                gone.cancel()
                await asyncio.sleep(0)
            elif not gone.cancelled():
                gone.exception()  # a connection may break instead of ending

    async def _left(self, gone: asyncio.Future, seconds: float) -> bool:
        """Whether the client left during these seconds."""
        done, _ = await asyncio.wait((gone,), timeout=seconds)
        if done:
            self.disconnects.append(asyncio.get_running_loop().time())
            return True
        return False

    def _control(self, path: str) -> tuple[int, Any] | None:
        if path == "/health":
            self.probes += 1
            return self.faults.health, b""
        if path == "/v1/models":
            card = {"id": self.model, "object": "model", "max_model_len": 4096}
            return 200, {"object": "list", "data": [card]}
        if path == "/server_info":
            info = {"model_path": self.model, "max_total_num_tokens": 65536, "page_size": 16}
            return 200, {**info, **self.info}
        if path == "/model_info":
            return 200, {"model_path": self.model, "is_generation": True}
        if path == "/v1/loads":
            rank = {"dp_rank": 0, "num_running_reqs": self.running, "num_waiting_reqs": 0}
            rank["token_usage"] = 0.25
            return 200, {"loads": [rank]}
        if path == "/flush_cache":
            self.flushes += 1
            self.prompts.clear()
            return (200, b"Cache flushed.\n") if self.faults.status is None else (400, b"busy\n")
        if path == "/metrics":
            return 200, b"mock_metric 1\n"
        return None

    async def _send(self, writer, status: int, data: bytes, extra: dict[str, str] | None = None) -> None:
        head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n"
        head += "".join(f"{k}: {v}\r\n" for k, v in {**self.response_headers, **(extra or {})}.items())
        if self.faults.cut_body and data:
            writer.write(head.encode() + b"\r\n" + data[: len(data) // 2])
            await writer.drain()
            writer.transport.abort()
            return
        if self.faults.body_after_s:
            writer.write(head.encode() + b"\r\n")
            await asyncio.sleep(self.faults.body_after_s)
            writer.write(data)
        else:
            writer.write(head.encode() + b"\r\n" + data)
        await writer.drain()

    async def _generate(
        self, path: str, headers: dict[str, str], body: bytes, gone: asyncio.Future, writer
    ) -> bool:
        try:
            request = json.loads(body)
        except ValueError:
            request = {}
        sampling = request.get("sampling_params") or {}
        n = sampling.get("max_new_tokens") or request.get("max_tokens") or 4
        prompt = json.dumps(request.get("messages") or request.get("text") or request.get("prompt") or "")
        cached = max((_common(prompt, p) for p in self.prompts), default=0) // PAGE_CHARS * PAGE_CHARS // 4
        prompt_tokens = max(1, len(prompt) // 4)
        cached = min(cached, prompt_tokens - 1)
        self.prompts.append(prompt)
        del self.prompts[:-64]
        usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": n,
            "total_tokens": prompt_tokens + n,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        if not request.get("stream"):
            if self.faults.token_s and await self._left(gone, n * self.faults.token_s):
                return False
            text = "".join(f"tok{i} " for i in range(n))
            if path == "/generate":
                meta = {"prompt_tokens": prompt_tokens, "completion_tokens": n, "cached_tokens": cached}
                value = {"text": text, "meta_info": meta, "worker": self.name}
            else:
                message = {"role": "assistant", "content": text}
                choice = {"index": 0, "message": message, "text": text, "finish_reason": "length"}
                value = {
                    "id": "x", "object": "chat.completion", "created": 0, "model": self.model,
                    "choices": [choice], "usage": usage, "worker": self.name,
                }  # fmt: skip
            await self._send(writer, 200, json.dumps(value).encode())
            return True
        head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n"
        head += "".join(f"{k}: {v}\r\n" for k, v in self.response_headers.items())
        writer.write(head.encode() + b"\r\n")
        track = headers.get("x-resume") == "track"
        resume = request.get("resume") or {"token_ids": []}
        assert resume["token_ids"] == [100 + i for i in range(len(resume["token_ids"]))]
        for i in range(len(resume["token_ids"]), n):
            if self.faults.abort_after is not None and i >= self.faults.abort_after:
                if self.faults.half_event:
                    _chunk(writer, b": tokens 999\ndata: {")
                    await writer.drain()
                writer.transport.abort()
                return False
            event = {
                **self._event(path, i, usage),
                **{k: resume[k] for k in ("id", "created") if k in resume},
            }
            tokens = b": tokens %d\n" % (100 + i) if track else b""
            _chunk(writer, tokens + b"data: " + json.dumps(event).encode() + b"\n\n")
            await writer.drain()
            if self.faults.token_s and await self._left(gone, self.faults.token_s):
                return False
        _chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True

    def _event(self, path: str, i: int, usage: dict[str, Any]) -> dict[str, Any]:
        if path == "/generate":
            meta = {"prompt_tokens": usage["prompt_tokens"], "completion_tokens": i + 1}
            meta["cached_tokens"] = usage["prompt_tokens_details"]["cached_tokens"]
            return {"text": f"tok{i} ", "output_ids": [i], "meta_info": meta}
        choice = {"index": 0, "delta": {"content": f"tok{i} "}, "text": f"tok{i} ", "finish_reason": None}
        kind = "chat.completion.chunk"
        return {"id": self.name, "object": kind, "created": 7, "model": self.model, "choices": [choice]}


def _chunk(writer, data: bytes) -> None:
    writer.write(b"%x\r\n%s\r\n" % (len(data), data))


def _common(a: str, b: str) -> int:
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)
