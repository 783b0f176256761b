"""An EngineClient whose tokens are scripted, for tests of everything in front of an engine."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from jaxserve.messages import (
    CacheEvent,
    EngineDeadError,
    EngineRefusal,
    Finish,
    Generate,
    Info,
    Logprobs,
    Output,
    RankLoad,
)

INFO = Info(
    model_path="tiny/model",
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    dtype="float32",
    vocab_size=320,
    context_len=512,
    eos_token_ids=[1],
    tokenizer_dir="tiny/model",
    generation_config={},
    page_size=16,
    max_total_num_tokens=4096,
    max_req_len=500,
    max_running_requests=8,
    chunked_prefill_size=256,
    dp_size=2,
    instance_id="instance-1",
    device_kind="cpu",
    num_devices=1,
    weight_bytes=1000,
    kv_cache_bytes=2000,
    load_weights_s=0.5,
    compile_s=1.0,
    startup_s=2.0,
)
LOAD = {
    "num_running_reqs": 1,
    "num_waiting_reqs": 2,
    "num_waiting_uncached_tokens": 7,
    "num_used_tokens": 48,
    "num_total_tokens": 55,
    "max_total_num_tokens": 2048,
    "max_running_requests": 4,
    "token_usage": 0.25,
    "gen_throughput": 10.5,
    "cache_hit_rate": 0.5,
    "utilization": 0.25,
    "memory": {"weight_gb": 1.0},
    "speculative": {"accept_length": 2.5, "accept_rate": 0.5},
    "queues": {"waiting": 2, "retracted": 1},
}
EXPERTS = {"balancedness": [0.5, 0.75], "device_tokens": [10, 30], "rebalances": 2, "moved": 7}


class FakeEngine:
    """Answers with `script(request)`, one token a step; records what it was asked and what was aborted."""

    def __init__(self, script: Callable[[Generate], list[int]], info: Info = INFO):
        self.info = info
        self.script = script
        self.delay_s = 0.0
        self.tokens_a_step = 1
        self.requests: list[Generate] = []
        self.aborted: list[str] = []  # by closing the stream early
        self.running: dict[str, _Stream] = {}
        self.fail: Finish | None = None  # every request ends with this at once
        self.dead = False
        self.close_delay_s = 0.0
        self.hang = False  # no token ever comes
        self.hang_prefix = "\0"  # nor for rids that begin so
        self.mute = False  # no question is answered
        self.busy = 0  # how often flush_cache is refused
        self.calls: list[str] = []
        self.has_experts = True

    def generate(self, request: Generate, take: Callable[[Output], bool]) -> AsyncIterator[None]:
        if self.dead:
            raise EngineDeadError("fake engine is dead")
        self.requests.append(request)
        stream = self.running[request.rid] = _Stream(self, request, take)
        return stream

    async def abort(self, rids: list[str], all: bool = False) -> None:
        for rid in list(self.running) if all else rids:
            if rid in self.running:
                self.running[rid].abort()

    @property
    def loads(self) -> list[RankLoad]:
        return [RankLoad(1, 2, 7, 0.25), RankLoad(3, 0, 0, 0.5)]

    async def watch_cache(self, take: Callable[[list[CacheEvent]], None]) -> None:
        if self.dead:
            raise EngineDeadError("fake engine is dead")
        self.take_cache_events = take

    async def call(self, method: str) -> Any:
        self.calls.append(method)
        if self.dead:
            raise EngineDeadError("fake engine is dead")
        if self.mute:
            await asyncio.Event().wait()
        if method == "flush_cache":
            if self.running or self.busy > 0:
                self.busy -= 1
                raise EngineRefusal(f"{len(self.running)} requests run")
            return None
        if method == "loads":
            return [{"dp_rank": r, **LOAD} for r in range(self.info.dp_size)]
        if method.endswith("_expert_record"):
            if not self.has_experts:
                raise EngineRefusal("this model has no experts")
            return {"logical_count": [[3, 1]]} if method.startswith("dump") else None
        tokens = {"prompt_tokens": [9, 7], "cached_tokens": [4, 0], "generation_tokens": [20, 30]}
        experts = {"experts": EXPERTS} if self.has_experts else {}
        return {"compiles_after_ready": 0, "retractions": 3} | tokens | experts


class _Stream:
    def __init__(self, engine: FakeEngine, request: Generate, take: Callable[[Output], bool]):
        self._engine, self._request, self._take = engine, request, take
        self._left = engine.script(request)[len(request.output_ids) :]
        self._made = len(request.output_ids)
        self._first = True
        self._over = False
        self._aborted = asyncio.Event()

    def __aiter__(self) -> "_Stream":
        return self

    def abort(self) -> None:
        self._aborted.set()

    async def aclose(self) -> None:
        if not self._over:
            self._over = True
            self._engine.aborted.append(self._request.rid)
            self._engine.running.pop(self._request.rid, None)
        if self._engine.close_delay_s:
            await asyncio.sleep(self._engine.close_delay_s)

    async def __anext__(self) -> None:
        while not self._take(await self._next()):
            pass

    async def _next(self) -> Output:
        if self._over:
            raise StopAsyncIteration
        if self._engine.dead:
            raise EngineDeadError("fake engine is dead")
        await self._wait()
        engine, request = self._engine, self._request
        finish = engine.fail
        if request.sampling.grammar and not self._left and request.output_ids and finish is None:
            finish = Finish(type="stop")  # what was generated elsewhere is all
        if self._aborted.is_set():
            finish = Finish(type="abort", message="aborted by request")
        token_ids: list[int] = []
        while finish is None and len(token_ids) < engine.tokens_a_step:
            token = self._left.pop(0) if self._left else (request.sampling.stop_token_ids or (5,))[0]
            token_ids.append(token)
            self._made += 1
            if token in request.sampling.stop_token_ids:
                finish = Finish(type="stop", matched=token)
            elif request.sampling.grammar and not self._left:  # what was said is all that it allows
                finish = Finish(type="stop")
            elif self._made >= request.sampling.max_new_tokens:
                finish = Finish(type="length", length=self._made)
        first, self._first = self._first, False
        if finish is not None:
            self._over = True
            engine.running.pop(request.rid, None)
        return Output(
            rid=request.rid,
            token_ids=token_ids,
            finish=finish,
            prompt_tokens=len(request.input_ids),
            cached_tokens=2,
            dp_rank=request.dp_rank or 0,
            logprobs=self._logprobs(token_ids) if request.return_logprob else None,
            prompt_logprobs=self._prompt_logprobs() if first and request.return_logprob else None,
            queue_time_s=0.001 if first else None,
        )

    async def _wait(self) -> None:
        hangs = self._engine.hang or self._request.rid.startswith(self._engine.hang_prefix)
        timeout_s = None if hangs else self._engine.delay_s
        if timeout_s == 0.0:
            await asyncio.sleep(0)
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._aborted.wait(), timeout_s)

    def _logprobs(self, token_ids: list[int]) -> Logprobs:
        request = self._request
        return Logprobs(
            values=[-0.5] * len(token_ids),
            top=[_top(t, request.top_logprobs_num) for t in token_ids] if request.top_logprobs_num else [],
            ids=[[(-3.0, i) for i in request.token_ids_logprob] for _ in token_ids]
            if request.token_ids_logprob
            else [],
        )

    def _prompt_logprobs(self) -> Logprobs | None:
        request = self._request
        if request.logprob_start_len < 0:
            return None
        positions = range(request.logprob_start_len, len(request.input_ids))
        tops = [_top(request.input_ids[p], request.top_logprobs_num) if p else [] for p in positions]
        return Logprobs(
            values=[-0.25 if p else None for p in positions],
            top=tops if request.top_logprobs_num else [],
        )


def _top(token: int, k: int) -> list[tuple[float, int]]:
    return [(-0.5 - i, token + i) for i in range(k)]
