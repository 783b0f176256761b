"""The engine's life after start: receive, plan, launch, publish; one step ahead of the device.

Step k+1 is planned and launched before step k's tokens are read, so the device never waits for the
host. A stop condition is therefore seen one step late; the extra token is dropped. Only where drafts
are to be checked does a step wait for the one before: what follows depends on how many were right. And
where a request has a grammar, which depends on every token, the step samples after the one before is read.
"""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from jaxserve.engine import batch
from jaxserve.engine.cache_watch import CacheWatch
from jaxserve.engine.constraints import Constraints
from jaxserve.engine.expert_watch import ExpertWatch
from jaxserve.engine.request import Request
from jaxserve.engine.runner import Runner, Step, StepResult
from jaxserve.engine.scheduler import Scheduler
from jaxserve.engine.stats import Stats
from jaxserve.messages import (
    Abort,
    CacheEvents,
    Call,
    Drain,
    Finish,
    FromEngine,
    Generate,
    Info,
    Logprobs,
    Output,
    Outputs,
    RankLoad,
    Reply,
    ToEngine,
)

logger = logging.getLogger(__name__)

AUDIT_AFTER_S = 0.5  # of idleness: who asks one thing at a time does not wait for it
GRAMMAR_WAIT_S = 0.002  # between two looks whether a grammar is ready, when there is nothing else to do
LOAD_INTERVAL_S = 0.02  # between two reports of the load; one costs a walk over the waiting requests


class Endpoint(Protocol):
    """The engine's end of the wire."""

    def receive(self, timeout_s: float | None) -> list[ToEngine]:
        """Every message that has come; waits for the first up to `timeout_s` (None: for ever)."""
        ...

    def send(self, message: FromEngine) -> None: ...


class EngineLoop:
    """Owns the scheduler and the runner; the only thread that touches them."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        endpoint: Endpoint,
        info: Info,
        stats: Stats,
        constraints: Constraints | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.scheduler = scheduler
        self.runner = runner
        self.info = info
        self.stats = stats
        self._constraints = constraints
        self._endpoint = endpoint
        self._clock = clock
        self._in_flight: Step | None = None
        self._drain_until_s: float | None = None
        self._is_audited = False  # nothing came since
        self._prompt_logprobs: dict[str, list[Logprobs]] = {}
        self._cache_watch = CacheWatch([rank.tree for rank in scheduler.ranks])
        self._load_told_s = 0.0
        self.expert_watch = None if runner.experts is None else ExpertWatch(runner)

    def run(self) -> None:
        """Serve until a Drain is done."""
        self.stats.loop_thread = threading.get_ident()
        try:
            while not self._drained():
                self._receive()
                self._step()
            self.scheduler.check()
        finally:
            self.stats.loop_thread = None
            if self._constraints is not None:
                self._constraints.close()

    # ---- messages ----

    def _receive(self) -> None:
        timeout_s, is_idle = 0.0, False
        if self._in_flight is None and not self.scheduler.has_work:
            if self._waiting_for_grammars:
                timeout_s = GRAMMAR_WAIT_S
            elif self._drain_until_s is None:
                timeout_s, is_idle = None if self._is_audited else AUDIT_AFTER_S, True
        messages = self._endpoint.receive(timeout_s)
        if messages:
            self._is_audited = False
        elif is_idle:
            self.scheduler.check()
            self._is_audited = True
        for message in messages:
            match message:
                case Generate():
                    self._submit(message)
                case Abort():
                    self._abort(self._rids if message.all else message.rids)
                case Call():
                    self._endpoint.send(self._answer(message))
                case Drain():
                    self._drain_until_s = self._clock() + message.grace_s
        if self._constraints is not None:
            for spec, made in self._constraints.take_ready():
                if isinstance(made, str):
                    self._refuse(spec, made)
                elif made.is_complete:
                    self._answer_at_once(spec, Finish("stop"))
                else:
                    self.scheduler.submit(spec, made)

    @property
    def _waiting_for_grammars(self) -> Sequence[str]:
        return () if self._constraints is None else self._constraints.waiting

    @property
    def _rids(self) -> list[str]:
        """All requests that are here."""
        return [*self.scheduler.requests, *self._waiting_for_grammars]

    def _submit(self, spec: Generate) -> None:
        if refusal := self._refusal(spec):
            self._refuse(spec, refusal)
        elif not spec.sampling.grammar:
            self.scheduler.submit(spec)
        else:
            assert self._constraints is not None
            self._constraints.prepare(spec)

    def _refuse(self, spec: Generate, refusal: str) -> None:
        self._answer_at_once(spec, Finish("abort", message=refusal, status_code=400))

    def _answer_at_once(self, spec: Generate, finish: Finish) -> None:
        self._endpoint.send(Outputs([Output(spec.rid, finish=finish, prompt_tokens=len(spec.input_ids))]))

    def _refusal(self, spec: Generate) -> str | None:
        """Why a request cannot be taken; the HTTP process checks most of it before."""
        length, done, limit = len(spec.input_ids), len(spec.output_ids), self.info.max_req_len
        sampling = spec.sampling
        if not length:
            return "input_ids is empty"
        if length >= limit:
            return f"the prompt has {length} tokens; this server takes at most {limit - 1}"
        if length + sampling.max_new_tokens > limit:
            return (
                f"prompt ({length} tokens) plus max_new_tokens ({sampling.max_new_tokens}) exceed "
                f"the limit of {limit} tokens"
            )
        if sampling.max_new_tokens < 1:
            return f"max_new_tokens={sampling.max_new_tokens} must be at least 1"
        if done >= sampling.max_new_tokens:
            return f"output_ids has {done} tokens already; max_new_tokens is {sampling.max_new_tokens}"
        bad = [
            t
            for t in (*spec.input_ids, *spec.output_ids, *sampling.logit_bias, *spec.token_ids_logprob)
            if not 0 <= t < self.info.vocab_size
        ]
        if bad:
            return f"token id {bad[0]} is outside the vocabulary of {self.info.vocab_size}"
        if len(sampling.logit_bias) + len(sampling.stop_token_ids) > batch.NUM_BIASES:
            return f"logit_bias and stop_token_ids have more than {batch.NUM_BIASES} entries together"
        if not 0 <= spec.top_logprobs_num <= batch.NUM_TOP_LOGPROBS:
            return f"top_logprobs_num={spec.top_logprobs_num} must lie in 0..{batch.NUM_TOP_LOGPROBS}"
        if len(spec.token_ids_logprob) > batch.NUM_LOGPROB_IDS:
            return f"token_ids_logprob has more than {batch.NUM_LOGPROB_IDS} entries"
        if sampling.grammar and self._constraints is None:
            return "this engine serves no grammars"
        if spec.dp_rank is not None and not 0 <= spec.dp_rank < len(self.scheduler.ranks):
            return f"routed_dp_rank={spec.dp_rank} must lie in 0..{len(self.scheduler.ranks) - 1}"
        return None

    def _abort(
        self, rids: list[str], message: str = "aborted by the client", status: int | None = None
    ) -> None:
        finish = Finish("abort", message=message, status_code=status)
        if self._constraints is not None:
            for rid in rids:
                if (spec := self._constraints.drop(rid)) is not None:
                    self.stats.aborted += 1
                    output = Output(rid, finish=finish, prompt_tokens=len(spec.input_ids))
                    self._endpoint.send(Outputs([output]))
        ended = [r for rid in rids if (r := self.scheduler.abort(rid, finish))]
        self.stats.aborted += len(ended)
        if ended:
            self._tell_cache_events()
            self._endpoint.send(Outputs([self._output(r, []) for r in ended], loads=self._due_loads()))
        for request in ended:
            self._prompt_logprobs.pop(request.spec.rid, None)

    def _answer(self, call: Call) -> Reply:
        match call.method:
            case "flush_cache":
                if self._in_flight is not None and not self.scheduler.has_work:
                    self._publish(self._in_flight)  # it ran ahead of its requests' end
                    self._in_flight = None
                if self.scheduler.has_work or self._waiting_for_grammars:
                    running = len(self._rids)
                    return Reply(call.call_id, False, message=f"not flushed: {running} requests are pending")
                pages = self.scheduler.flush()
                self._tell_cache_events()
                return Reply(call.call_id, True, pages)
            case "loads":
                waiting = len(self._waiting_for_grammars)
                return Reply(call.call_id, True, self.stats.loads(self.scheduler, self.info, waiting))
            case "stats":
                experts = {} if self.expert_watch is None else {"experts": self.expert_watch.snapshot()}
                return Reply(call.call_id, True, {**self.stats.snapshot(self.scheduler), **experts})
            case "start_expert_record" | "stop_expert_record" | "dump_expert_record":
                return self._answer_record(call)
            case "watch_cache":
                self._cache_watch.start()
                self._tell_cache_events()
                return Reply(call.call_id, True)

    def _answer_record(self, call: Call) -> Reply:
        watch = self.expert_watch
        if watch is None:
            return Reply(call.call_id, False, message="this model has no experts")
        try:
            match call.method:
                case "start_expert_record":
                    return Reply(call.call_id, True, watch.start_record())
                case "stop_expert_record":
                    return Reply(call.call_id, True, watch.stop_record())
            return Reply(call.call_id, True, watch.dump_record())
        except ValueError as error:
            return Reply(call.call_id, False, message=str(error))

    def _drained(self) -> bool:
        if self._drain_until_s is None:
            return False
        if self._clock() > self._drain_until_s and self._rids:
            self._abort(self._rids, "the server is shutting down", 503)
        return not self._rids and self._in_flight is None

    # ---- steps ----

    def _step(self) -> None:
        if self._in_flight is not None and (self._in_flight.plan.has_drafts or self.scheduler.drafts_next):
            self._publish(self._in_flight)
            self._in_flight = None
        plan = self.scheduler.plan()
        if plan is not None and self.expert_watch is not None:
            self.expert_watch.before_steps(plan.num_steps)
        step = self.runner.launch(plan) if plan is not None else None
        self._tell_cache_events()
        if self._in_flight is not None:
            self._publish(self._in_flight)
        elif step is None and self.scheduler.has_work:
            raise AssertionError(f"{len(self.scheduler.requests)} requests wait and none can be planned")
        if step is not None and step.plan.is_constrained:
            self._sample(step)
        self._in_flight = step

    def _sample(self, step: Step) -> None:
        """In a step with grammars, whose state is now that behind every token before."""
        constraints = self._constraints
        assert constraints is not None

        def fill(masks_RW: np.ndarray, requests: Sequence[Request]) -> None:
            constraints.fill(masks_RW, [request.constraint for request in requests if request.constraint])

        masked = [
            [request for request in rank.sampled if request.has_mask and request.finish is None]
            for rank in step.plan.ranks
        ]
        self.runner.sample(step, masked, fill)
        for request in itertools.chain.from_iterable(masked):
            if request.constraint is not None and (error := request.constraint.error):
                self._abort([request.spec.rid], f"the grammar: {error}", 400)

    def _publish(self, step: Step) -> None:
        result = self.runner.read(step)
        drafts = self.runner.start_drafts(step, result)
        self._keep_prompt_logprobs(step, result)
        rows = _rows_with_logprobs(step) if any(result.sampled) else {}
        new_tokens = [0] * len(self.scheduler.ranks)
        outputs, plain = [], {}
        for request, tokens in self.scheduler.retire(step.plan, result.tokens):
            new_tokens[request.rank] += len(tokens)
            if request in rows:
                rank, row = rows[request]
                part = slice(row, row + len(tokens))
                sampled = {name: array[part] for name, array in result.sampled[rank].items()}
                outputs.append(self._output(request, tokens, _logprobs(request.spec, sampled)))
            elif request.finish is None and request.first_output_sent and not request.num_verified:
                plain[request.spec.rid] = tokens
            else:
                outputs.append(self._output(request, tokens))
        self.stats.record(step.plan.num_steps, new_tokens, outputs, self._clock())
        loads = self._due_loads()
        if outputs or plain or (loads and self.scheduler.has_work):  # also a sign of life in a long prompt
            self._tell_cache_events()
            self._endpoint.send(Outputs(outputs, plain, loads))
        if drafts is not None and self.runner.nextn is not None:
            self.runner.nextn.give(step.bucket, step.plan, drafts)

    def _tell_cache_events(self) -> None:
        if events := self._cache_watch.take():
            self._endpoint.send(CacheEvents(events))

    def _due_loads(self) -> list[RankLoad]:
        """The ranks' loads when some time has passed since they were told, or when nothing is left to do."""
        now_s = self._clock()
        if now_s - self._load_told_s < LOAD_INTERVAL_S and self.scheduler.has_work:
            return []
        self._load_told_s = now_s
        return self.stats.brief_loads(self.scheduler)

    def _output(self, request: Request, tokens: list[int], logprobs: Logprobs | None = None) -> Output:
        first = not request.first_output_sent
        request.first_output_sent = True
        waited = None
        if first and request.admitted_s is not None:
            waited = request.admitted_s - request.arrival_s
        return Output(
            rid=request.spec.rid,
            token_ids=tokens,
            finish=request.finish,
            prompt_tokens=request.prompt_len,
            cached_tokens=max(request.cached_tokens, 0),
            dp_rank=request.rank,
            num_retractions=request.num_retractions,
            logprobs=logprobs,
            prompt_logprobs=self._take_prompt_logprobs(request) if first else None,
            queue_time_s=waited,
            spec_steps=request.num_verified,
            spec_drafted=request.num_drafted,
            spec_accepted=request.num_accepted,
        )

    # ---- logprobs ----

    def _keep_prompt_logprobs(self, step: Step, result: StepResult) -> None:
        """Collect the scores of a step's prompt chunks until the request's first output.

        A prompt that was retracted between its chunks comes again, from the first wanted score on.
        """
        if result.scored is None:
            return
        for plan, scored in zip(step.plan.ranks, result.scored):
            at = plan.first_prompt_token
            for chunk in plan.chunks:
                spec = chunk.request.spec
                if chunk.request.wants_prompt_logprobs and chunk.request.finish is None:
                    first = max(spec.logprob_start_len, 1)  # nothing comes before the first token
                    begin = max(chunk.start, first - 1)
                    end = min(chunk.start + chunk.length, chunk.request.prompt_len - 1)
                    rows = slice(at + begin - chunk.start, at + max(begin, end) - chunk.start)
                    part = _logprobs(spec, {name: array[rows] for name, array in scored.items()})
                    before = [] if chunk.start < first else self._prompt_logprobs[spec.rid]
                    self._prompt_logprobs[spec.rid] = [*before, part]
                at += chunk.length

    def _take_prompt_logprobs(self, request: Request) -> Logprobs | None:
        spec = request.spec
        parts = self._prompt_logprobs.pop(spec.rid, [])
        if not spec.return_logprob or spec.logprob_start_len < 0:
            return None
        if spec.logprob_start_len == 0:
            parts = [
                Logprobs([None], [[]] * bool(spec.top_logprobs_num), [[]] * bool(spec.token_ids_logprob)),
                *parts,
            ]
        return Logprobs(
            values=[v for part in parts for v in part.values],
            top=[t for part in parts for t in part.top],
            ids=[i for part in parts for i in part.ids],
        )


def _rows_with_logprobs(step: Step) -> dict[Request, tuple[int, int]]:
    """(rank, first row) of the requests that want logprobs."""
    return {
        request: (rank, row)
        for rank, plan in enumerate(step.plan.ranks)
        for row, (request, number) in enumerate(plan.sample_rows())
        if number == 0 and request.spec.return_logprob
    }


def _logprobs(spec: Generate, rows: dict[str, np.ndarray]) -> Logprobs:
    """The part of some rows' logprobs that a request asked for."""
    values = rows["logprob"].tolist()
    top: list[list[tuple[float, int]]] = []
    ids: list[list[tuple[float, int]]] = []
    if k := spec.top_logprobs_num:
        pairs = zip(rows["top"][:, :k].tolist(), rows["top_ids"][:, :k].tolist())
        top = [list(zip(logprobs, tokens)) for logprobs, tokens in pairs]
    if wanted := spec.token_ids_logprob:
        ids = [list(zip(logprobs, wanted)) for logprobs in rows["ids"][:, : len(wanted)].tolist()]
    return Logprobs(values=values, top=top, ids=ids)
