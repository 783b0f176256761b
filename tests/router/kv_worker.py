"""A mock worker that publishes KV events as PROTOCOL.md says, and one tokenizer for it and the gateway."""

import asyncio
import json
import uuid
from collections import deque
from pathlib import Path
from urllib.parse import parse_qs

import tokenizers
from mock_worker import MockWorker, Seen, _chunk

from router.page_hash import page_hashes, root_hash

PAGE = 16
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if 'tool_calls' in m %}!{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_tokenizer(folder: Path) -> str:
    """A byte tokenizer (one token a byte) with a chat template; returns its directory."""
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocab = {c: i for i, c in enumerate(sorted(alphabet))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return str(folder)


class KvWorker(MockWorker):
    """Stores the pages of every prompt it is sent as token ids; `buffer_len` events can be replayed."""

    def __init__(self, tokenizer_dir: str, buffer_len: int = 1000, **settings) -> None:
        super().__init__(**settings)
        self.buffer_len = buffer_len
        self.new_instance()
        self.streams: list[asyncio.StreamWriter] = []
        self.connects: list[str] = []
        self.info = {"protocol": ["kv_events/1", "input_ids/1"], "tokenizer_path": tokenizer_dir}
        self.mute = False  # lose events instead of sending them

    def new_instance(self) -> None:
        self.instance = uuid.uuid4().hex
        self.seq = 0
        self.pages: dict[str, None] = {}
        self.log: deque[tuple[str, dict]] = deque(maxlen=self.buffer_len)

    def store(self, token_ids: list[int], salt: str = "", adapter: str = "") -> None:
        pages = [f"{h:016x}" for h in page_hashes(token_ids, PAGE, root_hash(adapter, salt))]
        new = [p for p in pages if p not in self.pages]
        if new:
            first = pages.index(new[0])
            self.pages.update(dict.fromkeys(new))
            self.emit("stored", rank=0, parent=pages[first - 1] if first else None, pages=new)

    def evict(self, count: int) -> None:
        """Drop the `count` pages stored last: they are the deepest."""
        gone = list(self.pages)[-count:]
        for page in gone:
            del self.pages[page]
        self.emit("removed", rank=0, pages=gone)

    def clear(self) -> None:
        self.pages.clear()
        self.emit("cleared", rank=0)

    def emit(self, kind: str, **data) -> None:
        self.seq += 1
        self.log.append((kind, {"seq": self.seq, **data}))
        if not self.mute:
            for writer in self.streams:
                _event(writer, *self.log[-1])

    async def drop_streams(self) -> None:
        for writer in self.streams:
            writer.transport.abort()
        self.streams.clear()
        await asyncio.sleep(0)

    async def _answer(self, method, target, headers, body, reader, writer) -> bool:
        path, _, query = target.partition("?")
        if path == "/kv_events":
            await self._kv_events(query, reader, writer)
            return False
        if self.faults.body is None and (path == "/generate" or path.endswith("completions")):
            ids = json.loads(body).get("input_ids") or []
            self.store(ids)
        return await super()._answer(method, target, headers, body, reader, writer)

    async def _kv_events(self, query: str, reader, writer) -> None:
        self.connects.append(query)
        asked = {k: v[0] for k, v in parse_qs(query).items()}
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        hello = {"instance": self.instance, "page_size": PAGE, "dp_size": 1, "next": self.seq + 1}
        _event(writer, "hello", hello)
        start = int(asked.get("from", 0))
        oldest = self.seq - len(self.log) + 1
        if asked.get("instance") == self.instance and start >= oldest:
            for kind, data in list(self.log):
                if data["seq"] >= start:
                    _event(writer, kind, data)
        else:
            pages = list(self.pages)
            cut = len(pages) // 2
            if cut:
                part = {"seq": self.seq, "rank": 0, "parent": None, "pages": pages[:cut], "last": False}
                _event(writer, "snapshot", part)
            rest = {"seq": self.seq, "rank": 0, "parent": None, "pages": pages[cut:], "last": True}
            _event(writer, "snapshot", rest)
        self.streams.append(writer)
        await reader.read(1)
        if writer in self.streams:
            self.streams.remove(writer)


def _event(writer, kind: str, data: dict) -> None:
    if not writer.transport.is_closing():
        _chunk(writer, f"event: {kind}\ndata: {json.dumps(data)}\n\n".encode())


__all__ = ["PAGE", "KvWorker", "Seen", "write_tokenizer"]
