"""The simulated worker's side of exact routing: its cache keyed by page hashes, its events, a tokenizer.

Tokens are bytes, so a page of 64 is what the worker's block of 64 characters is: the caches of a worker
with events and of one without hold the same text.
"""

import json
from pathlib import Path
from typing import Any

import tokenizers

from router.page_hash import page_hashes, root_hash

PAGE_SIZE = 64


def write_tokenizer(folder: Path) -> str:
    """A tokenizer of one token a byte; returns its directory."""
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {c: i for i, c in enumerate(sorted(alphabet))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


def chain_of_ids(ids: list[int]) -> list[int]:
    return page_hashes(ids, PAGE_SIZE, root_hash())


class Publisher:
    """Writes `GET /kv_events` to whoever follows. `write(bytes)` of a follower takes one chunk."""

    def __init__(self) -> None:
        self.seq = 0
        self.followers: list[Any] = []

    def follow(self, transport, pages: list[int]) -> None:
        """Start a stream with a snapshot of `pages`, parents first."""
        transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        hello = {"instance": "bench", "page_size": PAGE_SIZE, "dp_size": 1, "next": self.seq + 1}
        _event(transport, "hello", hello)
        held = {"seq": self.seq, "rank": 0, "parent": None, "pages": _hex(pages), "last": True}
        _event(transport, "snapshot", held)
        self.followers.append(transport)

    def tell(self, kind: str, pages: list[int]) -> None:
        if not pages:
            return
        self.seq += 1
        self.followers = [t for t in self.followers if not t.is_closing()]
        for transport in self.followers:
            event = {"seq": self.seq, "rank": 0, "pages": _hex(pages)}
            _event(transport, kind, {**event, "parent": None} if kind == "stored" else event)

    def keep_alive(self) -> None:
        for transport in self.followers:
            transport.write(b"3\r\n:\n\n\r\n")


def _event(transport, kind: str, data: dict) -> None:
    text = f"event: {kind}\ndata: {json.dumps(data)}\n\n".encode()
    transport.write(b"%x\r\n%s\r\n" % (len(text), text))


def _hex(pages: list[int]) -> list[str]:
    return [f"{page:016x}" for page in pages]
