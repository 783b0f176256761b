"""A simulated worker: `python -m router.bench.worker --port P --cache-blocks 1536 --prefill-us 20`.

One "device" per worker: prompts are prefilled one after the other at `prefill_us` a token that is not
cached, then decoded concurrently at `decode_us` a token. The cache is an LRU of hash-chained blocks of
64 characters (16 tokens of 4). Everything is instant unless asked for, for measurements of pure overhead.
With `--tokenizer DIR` it publishes KV events and takes token ids (`router.bench.kv`).
Faults are set by `POST /bench/config`, counts are read from `GET /bench/stats`.
"""

import argparse
import asyncio
import gc
import json
import random
import re
import sys
from collections import OrderedDict
from typing import Any

import httptools

from router.bench.kv import Publisher, chain_of_ids

CHARS_PER_TOKEN = 4
BLOCK_CHARS = 64
KEEP_ALIVE_S = 4.0


def _whole(status: int, value: Any) -> bytes:
    body = json.dumps(value).encode()
    return (
        b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % (status, len(body))
        + body
    )


# What a worker that does nothing answers, so that little of a shared machine goes into it.
_META = {"prompt_tokens": 50, "completion_tokens": 8, "cached_tokens": 0}
INSTANT = _whole(200, {"text": "tok " * 8, "meta_info": _META})


_streams = re.compile(rb'"stream"\s*:\s*true').search  # some gateways write the body anew


class Cache:
    """An LRU of block hashes; a block's ancestors are always more recent than it."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.blocks: OrderedDict[int, None] = OrderedDict()

    def hit_blocks(self, chain: list[int]) -> int:
        return next((i for i, block in enumerate(chain) if block not in self.blocks), len(chain))

    def insert(self, chain: list[int]) -> tuple[list[int], list[int]]:
        """Returns the blocks that are new, and those that had to go."""
        new = [block for block in chain if block not in self.blocks]
        for block in reversed(chain):
            self.blocks[block] = None
            self.blocks.move_to_end(block)
        gone = []
        while len(self.blocks) > self.capacity:
            gone.append(self.blocks.popitem(last=False)[0])
        return new, gone


def chain_of(text: str) -> list[int]:
    chain, parent = [], 0
    for at in range(0, len(text) - BLOCK_CHARS + 1, BLOCK_CHARS):
        parent = hash((parent, text[at : at + BLOCK_CHARS]))
        chain.append(parent)
    return chain


class Device:
    """State shared by the connections of one worker."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.model = given.model
        self.cache = Cache(given.cache_blocks)
        self.prefill_us, self.decode_us = given.prefill_us, given.decode_us
        self.tokenizer = given.tokenizer
        self.publisher = Publisher()
        self.free_at_s = 0.0
        self.instant = given.instant
        self.faults: dict[str, Any] = {}
        self.reset()

    def reset(self) -> None:
        self.requests = self.prompt_tokens = self.cached_tokens = self.disconnects = 0
        self.busy_s = 0.0

    def stats(self) -> dict[str, Any]:
        names = ("requests", "prompt_tokens", "cached_tokens", "disconnects", "busy_s")
        return {name: getattr(self, name) for name in names}


class Connection(asyncio.Protocol):
    """One connection; requests on it are answered in turn."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.loop = asyncio.get_running_loop()
        self.parser = httptools.HttpRequestParser(self)
        self.url, self.body = b"", []
        self.running = False
        self.gone = False
        self.transport: asyncio.Transport = None  # type: ignore[assignment]

    def connection_made(self, transport) -> None:  # type: ignore[override]
        self.transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone = True
        if self.running:
            self.device.disconnects += 1

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.transport.abort()

    def on_message_begin(self) -> None:
        self.url, self.body = b"", []

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_body(self, body: bytes) -> None:
        self.body.append(body)

    def on_message_complete(self) -> None:
        path = self.url.partition(b"?")[0].decode()
        body = b"".join(self.body)
        if path in ("/generate", "/v1/chat/completions", "/v1/completions"):
            self._generate(path, body)
        else:
            self._control(path, body)

    def _control(self, path: str, body: bytes) -> None:
        device = self.device
        if path == "/health":
            self._answer(200, {"status": "ok"})
        elif path in ("/server_info", "/get_server_info"):
            tokens = device.cache.capacity * BLOCK_CHARS // CHARS_PER_TOKEN
            info = {"model_path": device.model, "max_total_num_tokens": tokens, "page_size": 16}
            if device.tokenizer:
                info["protocol"] = ["kv_events/1", "input_ids/1"]
                info["tokenizer_path"] = device.tokenizer
            self._answer(200, {**info, "tp_size": 1, "dp_size": 1, "disaggregation_mode": "null"})
        elif path in ("/model_info", "/get_model_info"):
            self._answer(200, {"model_path": device.model, "is_generation": True})
        elif path == "/v1/models":
            self._answer(200, {"object": "list", "data": [{"id": device.model, "object": "model"}]})
        elif path == "/kv_events" and device.tokenizer:
            device.publisher.follow(self.transport, list(reversed(device.cache.blocks)))
        elif path == "/bench/stats":
            self._answer(200, device.stats())
        elif path == "/bench/config":
            device.faults = json.loads(body or b"{}")
            self._answer(200, {})
        elif path == "/bench/reset":
            device.reset()
            device.publisher.tell("removed", list(device.cache.blocks))
            device.cache.blocks.clear()
            self._answer(200, {})
        else:
            self._answer(404, {"detail": "Not Found"})

    def _answer(self, status: int, value: Any) -> None:
        self.transport.write(_whole(status, value))

    def _generate(self, path: str, body: bytes) -> None:
        device, faults = self.device, self.device.faults
        if faults.get("drop"):
            self.transport.abort()
            return
        if faults.get("status"):
            self._answer(faults["status"], {"error": {"message": "injected"}})
            return
        if device.instant and not faults and not _streams(body):
            device.requests += 1
            self.transport.write(INSTANT)
            return
        request = json.loads(body)
        sampling = request.get("sampling_params") or {}
        num_out = sampling.get("max_new_tokens") or request.get("max_tokens") or 8
        text = request.get("text") or request.get("prompt")
        if text is None:
            messages = request.get("messages", ())
            text = "".join(f"<|{m['role']}|>{m['content']}" for m in messages)
        ids = request.get("input_ids")
        num_tokens = max(1, len(ids or text) // CHARS_PER_TOKEN)
        chain = (chain_of_ids(ids) if ids else chain_of(text)) if device.cache.capacity else []
        cached = min(device.cache.hit_blocks(chain) * BLOCK_CHARS // CHARS_PER_TOKEN, num_tokens - 1)
        reply = ""
        if chain:
            source = random.Random(chain[-1])
            reply = "".join(f"{source.randrange(4096):03x} " for _ in range(num_out))
            new, gone = device.cache.insert(chain if ids else chain_of(text + reply))
            device.publisher.tell("stored", new)
            device.publisher.tell("removed", gone)
        device.requests += 1
        device.prompt_tokens += num_tokens
        device.cached_tokens += cached
        self.running = True
        usage = (num_tokens, num_out, cached)
        go = self._stream if request.get("stream") else self._finish
        work_s = (num_tokens - cached) * device.prefill_us * 1e-6 + faults.get("delay_s", 0.0)
        if not request.get("stream"):
            delay_s = num_out * device.decode_us * 1e-6
        else:
            delay_s = 0.0
        if not work_s and not delay_s:
            go(path, reply, usage)
            return
        start_s = max(self.loop.time(), device.free_at_s)
        device.free_at_s = start_s + work_s
        device.busy_s += work_s
        self.loop.call_at(device.free_at_s + delay_s, go, path, reply, usage)

    def _finish(self, path: str, reply: str, usage: tuple[int, int, int]) -> None:
        self.running = False
        if self.gone:
            return
        num_tokens, num_out, cached = usage
        if path == "/generate":
            meta = {"prompt_tokens": num_tokens, "completion_tokens": num_out, "cached_tokens": cached}
            self._answer(200, {"text": reply, "meta_info": meta})
            return
        message = {"role": "assistant", "content": reply}
        counts: dict[str, Any] = {"prompt_tokens": num_tokens, "completion_tokens": num_out}
        counts["prompt_tokens_details"] = {"cached_tokens": cached}
        self._answer(200, {"choices": [{"index": 0, "message": message}], "usage": counts})

    def _stream(self, path: str, reply: str, usage: tuple[int, int, int]) -> None:
        if not self.gone:
            self.transport.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
            )
        self._token(path, reply, 0, usage)

    def _token(self, path: str, reply: str, i: int, usage: tuple[int, int, int]) -> None:
        num_tokens, num_out, cached = usage
        abort_after = self.device.faults.get("abort_after")
        if self.gone or (abort_after is not None and i >= abort_after):
            self.running = False
            self.transport.abort()
            return
        if i == num_out:
            self.running = False
            self.transport.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
            return
        piece = (reply[4 * i : 4 * i + 4] or "tok ").encode()
        if path == "/generate":
            event = (
                b'data: {"text": "%s", "output_ids": [%d], "meta_info": {"prompt_tokens": %d, '
                b'"completion_tokens": %d, "cached_tokens": %d}}\n\n' % (piece, i, num_tokens, i + 1, cached)
            )
        else:
            event = b'data: {"choices": [{"index": 0, "delta": {"content": "%s"}}]}\n\n' % piece
        self.transport.write(b"%x\r\n%s\r\n" % (len(event), event))
        if self.device.decode_us:
            self.loop.call_later(self.device.decode_us * 1e-6, self._token, path, reply, i + 1, usage)
        else:
            self.loop.call_soon(self._token, path, reply, i + 1, usage)


async def serve(given: argparse.Namespace) -> None:
    device = Device(given)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(device), "127.0.0.1", given.port, backlog=4096)
    if not given.port:
        port = server.sockets[0].getsockname()[1]
        print(f"running on http://127.0.0.1:{port}", file=sys.stderr, flush=True)

    def keep_alive() -> None:
        device.publisher.keep_alive()
        loop.call_later(KEEP_ALIVE_S, keep_alive)

    keep_alive()
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--port", type=int, required=True, help="0: a free one, which it tells")
    parser.add_argument("--model", default="bench")
    parser.add_argument("--instant", action="store_true", help="one constant answer, unless it streams")
    parser.add_argument("--tokenizer", help="directory of the byte tokenizer: publish KV events")
    parser.add_argument("--cache-blocks", type=int, default=0, help="capacity in blocks; 0: no cache")
    parser.add_argument("--prefill-us", type=float, default=0.0, help="for each uncached prompt token")
    parser.add_argument("--decode-us", type=float, default=0.0, help="for each output token")
    given = parser.parse_args()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    try:
        import uvloop
    except ImportError:
        asyncio.run(serve(given))
    else:
        uvloop.run(serve(given))


if __name__ == "__main__":
    main()
