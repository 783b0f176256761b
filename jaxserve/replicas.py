"""Native data parallelism: full replicas of a model behind one port, taken in turn.

`--dp-size N` without `--enable-dp-attention` starts N engine processes of `tp` devices each. Requests
go round robin, without regard to prefixes; the gateway (`python -m router.launch_server`) routes by
cached prefix and survives a dead replica, and is what to use in production.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import msgspec

from jaxserve.config import ServerConfig
from jaxserve.messages import CacheEvent, EngineClient, Generate, Info, Output, RankLoad


def replica_configs(config: ServerConfig) -> list[ServerConfig]:
    """One configuration a replica, on devices of its own; just the given one where dp is inside."""
    if config.dp_size == 1 or config.enable_dp_attention:
        return [config]
    return [
        replace(config, dp_size=1, base_gpu_id=config.base_gpu_id + i * config.tp)
        for i in range(config.dp_size)
    ]


class Replicas(EngineClient):
    """An EngineClient over several; a replica's number is what clients see as dp rank."""

    def __init__(self, clients: Sequence[EngineClient]):
        self._clients = clients
        self._turn = count()
        infos = [client.info for client in clients]
        self._info = msgspec.structs.replace(
            infos[0],
            dp_size=len(clients),
            num_devices=sum(i.num_devices for i in infos),
            max_total_num_tokens=sum(i.max_total_num_tokens for i in infos),
            max_running_requests=sum(i.max_running_requests for i in infos),
            weight_bytes=sum(i.weight_bytes for i in infos),
            kv_cache_bytes=sum(i.kv_cache_bytes for i in infos),
        )

    @property
    def info(self) -> Info:
        return self._info

    @property
    def loads(self) -> list[RankLoad]:
        return [load for client in self._clients for load in client.loads]

    def generate(self, request: Generate, take: Callable[[Output], bool]) -> AsyncIterator[None]:
        number = next(self._turn) % len(self._clients) if request.dp_rank is None else request.dp_rank

        def numbered(output: Output) -> bool:
            return take(msgspec.structs.replace(output, dp_rank=number))

        return self._clients[number].generate(msgspec.structs.replace(request, dp_rank=None), numbered)

    async def abort(self, rids: list[str], all: bool = False) -> None:
        await asyncio.gather(*(client.abort(rids, all) for client in self._clients))

    async def call(self, method: str) -> Any:
        answers = await asyncio.gather(*(client.call(method) for client in self._clients))
        if method == "loads":
            return [{**row, "dp_rank": number} for number, rows in enumerate(answers) for row in rows]
        if method == "stats":
            experts = [answer.pop("experts") for answer in answers if "experts" in answer]
            return _added(answers) | ({"experts": _experts(experts)} if experts else {})
        return answers

    async def watch_cache(self, take: Callable[[list[CacheEvent]], None]) -> None:
        def numbered(number: int) -> Callable[[list[CacheEvent]], None]:
            return lambda events: take([msgspec.structs.replace(e, rank=number) for e in events])

        await asyncio.gather(*(c.watch_cache(numbered(i)) for i, c in enumerate(self._clients)))


def _added(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Lists have one entry a dp rank or a device, numbers are totals: both add up."""
    return {name: sum((a[name] for a in answers[1:]), answers[0][name]) for name in answers[0]}


def _experts(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`ExpertWatch.snapshot` of all: layers are as balanced as where they are the least."""
    worst = [min(layer) for layer in zip(*(answer["balancedness"] for answer in answers))]
    return _added(answers) | {"balancedness": worst}
