"""Exact routing: who follows whose KV events, and a request's prompt as page hashes.

A worker takes part when its `/server_info` says `kv_events/1` and its tokenizer can be read here
(`--tokenizer-path`, or the worker's own path when that is a local directory).
"""

import asyncio
import contextlib
import logging
from collections.abc import Iterable
from pathlib import Path

import msgspec

from router.call import BAD_JSON, Call
from router.kv_events import FEATURE, KvImage, Subscription
from router.metrics import Metrics
from router.page_hash import page_hashes, root_hash
from router.prompt_tokens import PromptTokens
from router.workers import Registry, Worker

log = logging.getLogger("router")


class Exact:
    """Owns one subscription per worker process and one tokenizer. All on the event loop."""

    def __init__(self, registry: Registry, metrics: Metrics, tokenizer_path: str | None) -> None:
        self.registry = registry
        self.metrics = metrics
        self.tokenizer_path = tokenizer_path
        self.tokens: PromptTokens | None = None
        self.models: frozenset[str] = frozenset()  # names of the model whose tokenizer that is
        self.subscriptions: dict[str, Subscription] = {}  # by process URL
        self.failures = metrics.counter(
            "smg_kv_event_subscription_failures_total", "KV event streams that ended", "worker", "reason"
        )
        registry.on_removed.append(self._removed)

    @property
    def live(self) -> bool:
        """Whether any worker's image is to be believed, so that tokenizing is worth it."""
        return any(s.image.live for s in self.subscriptions.values())

    async def follow(self, workers: Iterable[Worker]) -> None:
        """Follow the process behind `workers` (its ranks) if it publishes events; else do so no longer."""
        ranks = list(workers)
        worker, url = ranks[0], ranks[0].spec.url
        offered = worker.info.get("protocol")
        publishes = isinstance(offered, list) and FEATURE in offered
        if not publishes or self.models != frozenset(worker.models):
            self._unfollow(url, ranks)
        if not publishes or not await self._load(worker):
            return
        ranks = [rank for rank in ranks if rank in self.registry.of_process(url)]
        if not ranks:  # removed meanwhile
            return
        subscription = self.subscriptions.get(url)
        if subscription is None:
            subscription = self.subscriptions[url] = Subscription(ranks[0], KvImage(), self._failed)
            subscription.start()
        subscription.worker = ranks[0]
        for rank in ranks:
            rank.kv = subscription.image

    async def prepare(self, call: Call) -> None:
        """Fill `call.token_ids` when the prompt's ids are certain."""
        if self.tokens is not None and self.live:
            with contextlib.suppress(
                *BAD_JSON
            ):  # in a field that routing does not read: the worker's to judge
                fields = call.fields
                call.cache_root = root_hash(self._adapter(call), fields.salt() if fields else "")
                call.token_ids = await self.tokens.ids(call)

    def lag_s(self) -> dict[tuple[str, ...], float]:
        """Seconds since the last event or comment, by worker."""
        now_s = asyncio.get_running_loop().time()
        return {(url,): now_s - s.last_event_s for url, s in self.subscriptions.items() if s.last_event_s}

    def pages(self) -> dict[tuple[str, ...], float]:
        """Pages known to be cached, by worker; absent while out of step."""
        return {(url,): float(s.image.num_pages()) for url, s in self.subscriptions.items() if s.image.live}

    async def close(self) -> None:
        await asyncio.gather(*(s.close() for s in self.subscriptions.values()))

    def _adapter(self, call: Call) -> str:
        """The adapter that the request names: in `lora_path`, or behind the model's name and a colon."""
        fields = call.fields
        if fields is None:
            return ""
        if fields.lora_path:
            decoded = msgspec.json.decode(fields.lora_path)
            return decoded if isinstance(decoded, str) else ""
        model = fields.model or ""
        if ":" not in model or model in self.models:
            return ""  # names of models may have colons too
        return model.partition(":")[2]

    async def _load(self, worker: Worker) -> bool:
        if self.tokens is not None and (self.subscriptions or self.models == frozenset(worker.models)):
            return self.models == frozenset(worker.models)
        path = self.tokenizer_path
        if path is None:
            path = worker.info.get("tokenizer_path") or worker.info.get("model_path")
            if not isinstance(path, str) or not (Path(path) / "tokenizer.json").is_file():
                log.info("worker %s publishes KV events; --tokenizer-path would use them", worker.url)
                return False
        try:
            # A template the worker was given instead of its model's own is the one to render here.
            self.tokens = await asyncio.to_thread(PromptTokens, path, worker.info.get("chat_template"))
        except (ValueError, OSError) as error:
            log.error("exact routing is off: %s", error)
            return False
        self.models = frozenset(worker.models)
        return True

    def _failed(self, worker: Worker, reason: str) -> None:
        self.failures.of(worker.url, reason).add()

    def _removed(self, worker: Worker) -> None:
        if not self.registry.of_process(worker.spec.url):
            self._unfollow(worker.spec.url, ())

    def _unfollow(self, url: str, ranks: Iterable[Worker]) -> None:
        for rank in ranks:
            rank.kv = None
        subscription = self.subscriptions.pop(url, None)
        if subscription is not None:
            subscription.image.live = False
            if subscription.task is not None:
                subscription.task.cancel()


def hashes_of(call: Call, page_size: int) -> list[int]:
    """The prompt's page hashes, computed once a page size. `call.token_ids` must be known."""
    found = call.pages.get(page_size)
    if found is None:
        assert call.token_ids is not None
        found = call.pages[page_size] = page_hashes(call.token_ids, page_size, call.cache_root)
    return found


def body_with_ids(call: Call) -> bytes | bytearray:
    """The body with the prompt as token ids, so that the worker need not tokenize it again."""
    if call.token_ids is None or call.fields is None or call.fields.input_ids:
        return call.body
    try:
        body = msgspec.json.decode(call.body)
    except BAD_JSON:
        return call.body
    if call.path == "/generate":
        body.pop("text", None)
        body["input_ids"] = call.token_ids
    elif call.path == "/v1/chat/completions":
        body["input_ids"] = call.token_ids
    elif call.path == "/v1/completions" and not body.get("echo"):
        body["prompt"] = call.token_ids
    else:
        return call.body
    return msgspec.json.encode(body)
