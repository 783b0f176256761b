"""cache_aware: the worker with the least work, where a cached prefix is work already done.

    cost(w) = 2 * (tokens to prefill at w) + (tokens queued at w) + 16 * (requests running at w)
              + pressure(w) * (tokens to prefill at w)

One number instead of thresholds: affinity yields to load exactly when waiting costs more than
recomputing. The factor 2 makes a miss dearer than an equal queue, because it also evicts what others
would have hit: with 1, prefixes are replicated until every cache holds everything badly (measured on
shared-prefix workloads: 539 requests/s against 850 with 2); with 8, growing chats starve behind their
own worker. `pressure` (0..0.5) is how full the worker's cache is: a miss at a full one evicts.

What a worker holds is an image: an LRU of hashes of 256-byte prompt blocks, chained, as large as the
worker's own cache; a worker that publishes KV events is known exactly instead, page by page, plus the
pages it is computing for requests already sent. The image is corrected by `cached_tokens` in the
answers: when a worker repeatedly had less than expected, its cache is smaller than it says, and the
image shrinks.
"""

import random
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from xxhash import xxh3_64_intdigest

from router.call import Call
from router.config import RouterConfig
from router.exact import hashes_of
from router.kv_events import KvImage
from router.policies import Policy
from router.policies.least_load import queued_tokens
from router.workers import Worker

BLOCK_BYTES = 256
MISS_WEIGHT = 2.0
PRESSURE_WEIGHT = 0.5
MIN_IMAGE_BLOCKS = 16
THEIRS_S = 5.0  # how long pages that another process has asked a worker for count as held; then events tell
MAX_THEIRS = 100_000
MAX_CHAIN_BYTES = 2 << 20  # of a prompt are hashed: 2.5 ms; what follows changes no decision


class Image:
    """What one worker's cache is believed to hold: at most `capacity` block hashes.

    A prefix's first block is always more recent than its later ones, so what is held of a chain is a
    prefix of it, and `match` may bisect.
    """

    __slots__ = ("blocks", "capacity", "ceiling", "wanted")

    def __init__(self, wanted: int) -> None:
        self.wanted = self.capacity = self.ceiling = max(MIN_IMAGE_BLOCKS, wanted)
        self.blocks: OrderedDict[int, None] = OrderedDict()

    def match(self, chain: list[int]) -> int:
        """How many leading blocks of `chain` are held."""
        blocks = self.blocks
        if not chain or chain[0] not in blocks:
            return 0
        if chain[-1] in blocks:
            return len(chain)
        low, high = 1, len(chain) - 1
        while low < high:
            middle = (low + high + 1) // 2
            if chain[middle - 1] in blocks:
                low = middle
            else:
                high = middle - 1
        return low

    def insert(self, chain: list[int]) -> None:
        """Make `chain` the most recent, its first block last; drop the oldest beyond capacity."""
        blocks = self.blocks
        for block in reversed(chain):
            blocks[block] = None
            blocks.move_to_end(block)
        while len(blocks) > self.capacity:
            blocks.popitem(last=False)

    def resize(self, capacity: int) -> None:
        self.capacity = min(self.ceiling, max(MIN_IMAGE_BLOCKS, capacity))
        while len(self.blocks) > self.capacity:
            self.blocks.popitem(last=False)


class CacheAware(Policy):
    reads_prompt = True
    orders = True

    def __init__(self, config: RouterConfig, rng: random.Random) -> None:
        super().__init__(config, rng)
        self.images: dict[Worker, Image] = {}
        self.clock = time.monotonic
        self.coming: dict[Worker, dict[int, int]] = {}  # pages being computed there, with a count
        self.theirs: dict[Worker, OrderedDict[int, float]] = {}  # for other processes, with an end time
        self.bytes_per_token = 4.0  # of prompt JSON; learned from the answers

    def choose(self, call: Call, workers: Sequence[Worker]) -> Worker:
        chain = call.chain
        if chain is None:
            chain = call.chain = block_chain(call)
        bytes_per_token = self.bytes_per_token
        tokens = call.prompt_tokens = int(len(call.prompt) / bytes_per_token)
        block_tokens = BLOCK_BYTES / bytes_per_token
        images = self.images
        ids = call.token_ids
        if ids is not None:
            tokens = call.prompt_tokens = len(ids)
        best, best_cost, best_hit, longest = None, 0.0, 0.0, 0.0
        for worker in workers:
            image = images.get(worker)
            if image is None:
                image = self._new_image(worker)
            kv = worker.kv
            if ids is not None and kv is not None and kv.live:
                hit = self._exact_hit(call, worker, kv)
            else:
                hit = image.match(chain) * block_tokens if chain else 0.0
            todo = tokens - hit
            full = len(image.blocks) / image.capacity
            cost = (MISS_WEIGHT + PRESSURE_WEIGHT * full) * todo + queued_tokens(worker)
            if hit > longest:
                longest = hit
            if best is None or cost < best_cost or (cost == best_cost and worker.total < best.total):
                best, best_cost, best_hit = worker, cost, hit
        assert best is not None
        call.predicted_tokens = int(best_hit)
        if best_hit:
            call.decision = "longest_prefix" if best_hit == longest else "shorter_prefix"
        else:
            call.decision = "least_work" if not longest else "prefix_too_busy"
        return best

    def placed(self, call: Call, worker: Worker) -> None:
        if call.chain:
            image = self.images.get(worker) or self._new_image(worker)  # cleared since, or not our choice
            image.insert(call.chain)
        if call.pages and worker.kv is not None:
            coming = self.coming.setdefault(worker, {})
            for page in call.pages.get(worker.kv.page_size, ()):
                coming[page] = coming.get(page, 0) + 1

    def news(self, call: Call, worker: Worker) -> Any:
        pages = call.pages.get(worker.kv.page_size) if worker.kv is not None else None
        return (call.chain, pages or ()) if call.chain or pages else None

    def heard(self, worker: Worker, news: Any) -> None:
        chain, pages = news
        if chain:
            image = self.images.get(worker) or self._new_image(worker)
            image.insert(chain)
        if pages:
            now_s = self.clock()
            theirs = self.theirs.setdefault(worker, OrderedDict())
            for page in pages:
                theirs[page] = now_s + THEIRS_S
                theirs.move_to_end(page)
            while theirs and (next(iter(theirs.values())) <= now_s or len(theirs) > MAX_THEIRS):
                theirs.popitem(last=False)

    def uncached(self, call: Call, worker: Worker) -> float:
        kv = worker.kv
        if call.token_ids is not None and kv is not None and kv.live:
            return call.prompt_tokens - self._exact_hit(call, worker, kv)
        image = self.images.get(worker)
        if image is None or not call.chain:
            return call.prompt_tokens
        return call.prompt_tokens - image.match(call.chain) * BLOCK_BYTES / self.bytes_per_token

    def prefilled(self, call: Call, worker: Worker) -> None:
        coming = self.coming.get(worker)
        if not coming or worker.kv is None:
            return
        for page in call.pages.get(worker.kv.page_size, ()):
            left = coming.get(page, 0) - 1
            if left > 0:
                coming[page] = left
            else:
                coming.pop(page, None)

    def learned(self, call: Call, worker: Worker, prompt_tokens: int, cached_tokens: int) -> None:
        if len(call.prompt) >= 4 * BLOCK_BYTES and prompt_tokens > 0:
            ratio = min(16.0, max(0.5, len(call.prompt) / prompt_tokens))
            self.bytes_per_token += 0.02 * (ratio - self.bytes_per_token)
        image = self.images.get(worker)
        if image is None or call.predicted_tokens < 0:
            return
        slack = 1.5 * BLOCK_BYTES / self.bytes_per_token + 0.1 * call.predicted_tokens
        if call.predicted_tokens > cached_tokens + slack:
            if len(image.blocks) > image.capacity // 2:
                image.resize(int(image.capacity * 0.98))
        elif image.capacity < image.ceiling and call.predicted_tokens:
            image.resize(int(image.capacity * 1.002) + 1)

    def cleared(self, worker: Worker) -> None:
        self.images.pop(worker, None)
        self.theirs.pop(worker, None)

    def _exact_hit(self, call: Call, worker: Worker, kv: KvImage) -> int:
        """Tokens of the prompt that `worker` holds or is computing now."""
        pages = hashes_of(call, kv.page_size)
        hit = kv.hit_pages(pages, worker.dp_rank)
        coming = self.coming.get(worker)
        theirs = self.theirs.get(worker)
        if coming or theirs:
            coming, theirs = coming or {}, theirs or {}
            now_s = self.clock() if theirs else 0.0
            while hit < len(pages) and (pages[hit] in coming or theirs.get(pages[hit], 0.0) > now_s):
                hit += 1
        return min(hit * kv.page_size, len(call.token_ids or ()) - 1)

    def forget(self, worker: Worker) -> None:
        super().forget(worker)
        self.coming.pop(worker, None)
        self._share_bound()

    def stats(self) -> dict[str, float]:
        blocks = sum(len(image.blocks) for image in self.images.values())
        return {"tree_chars": blocks * BLOCK_BYTES, "tree_nodes": blocks}

    def _new_image(self, worker: Worker) -> Image:
        tokens = worker.capacity_tokens
        wanted = int(tokens * self.bytes_per_token / BLOCK_BYTES) if tokens else 1 << 62
        self.images[worker] = image = Image(wanted)
        self._share_bound()
        return image

    def _share_bound(self) -> None:
        """Divide `max_tree_size` among the images."""
        if self.images:
            share = self.config.max_tree_size // BLOCK_BYTES // len(self.images)
            for image in self.images.values():
                shrunk = image.capacity / image.ceiling  # by corrections
                image.ceiling = max(MIN_IMAGE_BLOCKS, min(image.wanted, share))
                image.resize(int(shrunk * image.ceiling))


def block_chain(call: Call) -> list[int]:
    """A hash for every whole block of the prompt, each covering everything before it.

    Model, adapter and cache salt start the chain: what differs in them shares no cache.
    """
    prompt = call.prompt
    fields = call.fields
    seed = 0
    if fields is not None and (fields.model or fields.lora_path or fields.cache_salt or fields.extra_key):
        salt = f"{fields.model}\0{fields.salt()}\0".encode() + bytes(fields.lora_path)
        seed = xxh3_64_intdigest(salt)
    chain = []
    length = min(len(prompt), MAX_CHAIN_BYTES)
    for at in range(0, length - BLOCK_BYTES + 1, BLOCK_BYTES):
        seed = xxh3_64_intdigest(prompt[at : at + BLOCK_BYTES], seed)
        chain.append(seed)
    return chain
