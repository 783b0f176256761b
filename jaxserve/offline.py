"""`jaxserve.Engine`: the same engine and the same replies in one process, without HTTP.

with jaxserve.Engine(model_path="...") as engine:
    engine.generate(prompt="The capital of Japan is", sampling_params={"max_new_tokens": 8})
"""

import asyncio
import contextlib
import threading
from collections.abc import Coroutine, Iterator
from typing import Any

from jaxserve.config import ServerConfig
from jaxserve.engine.build import build, prepare_devices
from jaxserve.engine.loop import EngineLoop
from jaxserve.launch import load_text, load_text_early
from jaxserve.messages import Drain, EngineDeadError, FromEngine, Info
from jaxserve.progress import ProgressLines
from jaxserve.server.generate import reply, stream
from jaxserve.server.schema import GenerateBody, parse
from jaxserve.server.service import Service
from jaxserve.transport import Connection, QueueEndpoint

Reply = dict[str, Any]


class Engine:
    """An engine in a thread of this process.

    Keywords are the server's flags (`tp`, `dp_size`, `max_running_requests`, ...; `tp_size` and the
    other aliases work). Blocks until every program is compiled. Methods may be called from any thread.

    Raises:
        ConfigError, CheckpointError: what the server would refuse at its start.
    """

    def __init__(self, model_path: str, **server_args: Any):
        config = ServerConfig.from_keywords(model_path=model_path, **server_args)
        self._loop = asyncio.new_event_loop()
        self._threads = [threading.Thread(target=self._loop.run_forever, daemon=True)]
        self._threads[0].start()
        try:
            text = load_text_early(config)
            prepare_devices(config)
            endpoint = QueueEndpoint(self._deliver)
            scheduler, runner, info, stats, constraints = build(config, ProgressLines())
            self._connection = self._run(_connect(endpoint.put))
            self._deliver(info)
            self._engine = EngineLoop(scheduler, runner, endpoint, info, stats, constraints)
            self._threads.append(threading.Thread(target=self._serve, args=(self._engine,), daemon=True))
            self._threads[1].start()
            tokenizer, template = text or load_text(config, info.tokenizer_dir)
            self._service = self._run(
                _make_service(
                    self._connection,
                    config,
                    tokenizer,
                    chat_template=template,
                    generation_config=info.generation_config,
                )
            )
        except BaseException:
            self.shutdown()
            raise

    @property
    def info(self) -> Info:
        return self._connection.info

    def generate(
        self,
        prompt: str | list[str] | None = None,
        sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None,
        input_ids: list[int] | list[list[int]] | None = None,
        return_logprob: bool | list[bool] = False,
        logprob_start_len: int | list[int] | None = None,
        top_logprobs_num: int | list[int] = 0,
        stream: bool = False,
        **fields: Any,
    ) -> Reply | list[Reply] | Iterator[Reply]:
        """What `/generate` answers: a dict, a list for a batch, or with `stream` an iterator of dicts
        with cumulative text. Other fields of `/generate` are taken as keywords.

        Raises:
            RequestError: as HTTP would answer 400.
            EngineDeadError: the engine failed or was shut down.
        """
        body: dict[str, Any] = {
            "text": prompt,
            "input_ids": input_ids,
            "sampling_params": sampling_params or {},
            "return_logprob": return_logprob,
            "logprob_start_len": logprob_start_len,
            "top_logprobs_num": top_logprobs_num,
            "stream": stream,
            **fields,
        }
        parsed = parse(GenerateBody, {name: value for name, value in body.items() if value is not None})
        return self._stream(parsed) if stream else self._run(reply(self._service, parsed))

    def loads(self) -> list[dict[str, Any]]:
        """One dict a dp rank, as in `/v1/loads`."""
        return self._run(self._connection.call("loads"))

    def stats(self) -> dict[str, Any]:
        """The engine's totals since its start."""
        return self._run(self._connection.call("stats"))

    def flush_cache(self) -> None:
        """Forget every cached prefix. Raises EngineRefusal while requests run."""
        self._run(self._connection.call("flush_cache"))

    def abort(self) -> None:
        """End every running request; their callers get replies with an abort finish."""
        self._run(self._service.abort(None, abort_all=True))

    def shutdown(self) -> None:
        """End running requests and the engine, and free the devices' memory. Idempotent."""
        if len(self._threads) > 1 and self._threads[1].is_alive():
            self._connection.send(Drain(0.0))
            self._threads[1].join()
        if hasattr(self, "_engine"):
            del self._engine
        if self._threads[0].is_alive():
            if hasattr(self, "_connection"):
                self._run(_tell_all(self._connection))
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._threads[0].join()
            self._loop.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _run[T](self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop.is_closed():
            work.close()
            raise EngineDeadError("the engine was shut down")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _stream(self, body: GenerateBody) -> Iterator[Reply]:
        events = stream(self._service, body)
        try:
            while (event := self._run(_next(events))) is not None:
                yield event
        finally:
            with contextlib.suppress(EngineDeadError):  # it was shut down before the iterator was left
                self._run(events.aclose())  # type: ignore[attr-defined]

    def _serve(self, engine: EngineLoop) -> None:
        try:
            engine.run()
        except Exception as error:
            self._loop.call_soon_threadsafe(self._connection.fail, f"the engine failed: {error!r}")
            raise

    def _deliver(self, message: FromEngine) -> None:
        self._loop.call_soon_threadsafe(self._connection.deliver, message)


async def _connect(send: Any) -> Connection:
    return Connection(send)


async def _tell_all(connection: Connection) -> None:
    """Whoever still waits for the engine, in other threads, gets its last words or EngineDeadError."""
    connection.fail("the engine was shut down")
    waiting = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.gather(*waiting, return_exceptions=True)


async def _make_service(*args: Any, **kwargs: Any) -> Service:
    return Service(*args, **kwargs)


async def _next(events: Any) -> Reply | None:
    return await anext(events, None)
