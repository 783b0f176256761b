"""What each request adds to the metrics, with the cells it needs found by one lookup."""

from bisect import bisect_left

from router.call import Call
from router.errors import RequestError
from router.metrics import LATENCY_BUCKETS_S, Cell, HistogramCell, Metrics
from router.workers import Worker

ROUTER = ("regular", "regular", "http")  # router_type, backend_type, connection_mode
BRANCHED = ("manual", "consistent_hashing", "prefix_hash")  # have a counter of their own, as in SMG
MAX_MODELS = 256  # names come from clients when a worker does not tell its models


class StreamCells:
    """Of the streams of one (path, model). Times in seconds of the event loop."""

    __slots__ = ("generation", "itl", "tpot", "ttft")

    def __init__(self, m: Metrics, *labels: str) -> None:
        self.ttft: HistogramCell = m.ttft.of(*labels)
        self.itl = m.itl.of(*labels)
        self.tpot = m.tpot.of(*labels)
        self.generation = m.generation.of(*labels)

    def ended(self, started_s: float, first_s: float, last_s: float, num_tokens: int) -> None:
        """A whole stream: its request came, its first and its last byte went out."""
        self.generation.observe(last_s - started_s)
        if num_tokens > 1:
            self.tpot.observe((last_s - first_s) / (num_tokens - 1))


class RouteCells:
    """The cells of one (path, model, stream)."""

    __slots__ = (
        "completion_tokens", "durations", "http_requests", "ok", "prompt_tokens", "requests", "stream",
        "upstream_ok",
    )  # fmt: skip

    def __init__(self, m: Metrics, path: str, model: str, stream: bool) -> None:
        self.requests: Cell = m.requests.of(*ROUTER, model, path, "true" if stream else "false")
        self.durations = (m.duration.of(*ROUTER, model, path), m.http_duration.of("POST", path))
        self.http_requests = m.http_requests.of("POST", path)
        self.upstream_ok = m.upstream_responses.of("regular", "200", "")
        self.ok = m.http_responses.of(path, "200", "")
        self.prompt_tokens = m.tokens.of("regular", "regular", model, path, "prompt")
        self.completion_tokens = m.tokens.of("regular", "regular", model, path, "completion")
        self.stream = StreamCells(m, "regular", "regular", model, path)


class Recorder:
    """Turns events of the hot path into counts. Times in seconds of the event loop."""

    def __init__(self, metrics: Metrics, policy: str) -> None:
        self.metrics = metrics
        self.policy = policy
        self._routes: dict[tuple[str, str | None, bool], RouteCells] = {}
        self._placed: dict[tuple[str, str | None, str], tuple[Cell, ...]] = {}
        self._cached: dict[str, tuple[Cell, Cell]] = {}
        self._models: set[str] = set()
        self._branches = None
        if policy in BRANCHED:
            self._branches = metrics.counter(
                f"smg_{policy}_policy_branch_total", "choices by reason", "branch"
            )
        self._error = metrics.prediction_error.of()
        self.prompt_tokens = 0  # of answers that told their cached tokens
        self.cached_tokens: dict[str, int] = {}  # by the tier they came from

    def model_label(self, model: str | None) -> str:
        if model is None:
            return "unknown"
        if model not in self._models:
            if len(self._models) >= MAX_MODELS:
                return "other"
            self._models.add(model)
        return model

    def cells(self, call: Call) -> RouteCells:
        key = (call.route.path, call.model, call.stream)
        cells = self._routes.get(key)
        if cells is None:
            cells = RouteCells(self.metrics, call.path, self.model_label(call.model), call.stream)
            if len(self._routes) < 4 * MAX_MODELS:
                self._routes[key] = cells
        return cells

    def stream_cells(self, call: Call) -> StreamCells:
        return self.cells(call).stream

    def placed(self, call: Call, worker: Worker) -> None:
        key = (worker.url, call.model, call.decision)
        cells = self._placed.get(key)
        if cells is None:
            m, model = self.metrics, self.model_label(call.model)
            cells = (
                m.worker_requests.of(worker.url, model),
                m.selection.of("regular", "http", model, self.policy),
                m.decisions.of(self.policy, call.decision),
            )
            if self._branches is not None:
                cells += (self._branches.of(call.decision),)
            if len(self._placed) > 16 * MAX_MODELS:
                self._placed.clear()
            self._placed[key] = cells
        for cell in cells:
            cell.value += 1

    def finished(
        self,
        call: Call,
        status: int,
        started_s: float,
        now_s: float,
        prompt_tokens: int = 0,
        completion_tokens: int = 0,
        error: str = "",
    ) -> None:
        """An answer went out whole, or with `error`. Token counts as the worker reported them."""
        cells = self.cells(call)
        elapsed_s = now_s - started_s
        bucket = bisect_left(LATENCY_BUCKETS_S, elapsed_s)
        for histogram in cells.durations:
            histogram.counts[bucket] += 1
            histogram.total += elapsed_s
        cells.requests.value += 1
        cells.http_requests.value += 1
        if status == 200 and not error:
            cells.ok.value += 1
            cells.upstream_ok.value += 1
            cells.prompt_tokens.value += prompt_tokens
            cells.completion_tokens.value += completion_tokens
            return
        m = self.metrics
        m.http_responses.of(call.path, str(status), error).add()
        m.upstream_responses.of("regular", str(status), error).add()
        if error:
            m.errors.of(*ROUTER, self.model_label(call.model), call.path, error).add()

    def refused(self, path: str, call: Call | None, error: RequestError, elapsed_s: float) -> None:
        """The gateway itself answered with an error."""
        m = self.metrics
        # A model nobody serves is a client's invention, not a label.
        model = "unknown" if call is None or error.code == "model_not_found" else call.model
        m.errors.of(*ROUTER, self.model_label(model), path, error.code).add()
        m.http_requests.of("POST", path).add()
        m.http_responses.of(path, str(error.status), error.code).add()
        m.http_duration.of("POST", path).observe(elapsed_s)

    def cached(
        self, call: Call, worker: Worker, prompt_tokens: int, cached_tokens: int, tiers: dict[str, int] | None
    ) -> None:
        """What of a prompt was cached; `tiers` where the worker tells them, else it has the device alone."""
        self.prompt_tokens += prompt_tokens
        by_tier = self.cached_tokens
        if tiers:
            for tier, tokens in tiers.items():
                by_tier[tier] = by_tier.get(tier, 0) + tokens
        else:
            by_tier["device"] = by_tier.get("device", 0) + cached_tokens
        cells = self._cached.get(worker.url)
        if cells is None:
            m = self.metrics
            cells = (m.actual_tokens.of(worker.url), m.predicted_tokens.of(worker.url))
            self._cached[worker.url] = cells
        cells[0].value += cached_tokens
        if call.predicted_tokens >= 0:
            cells[1].value += call.predicted_tokens
            self._error.observe(abs(call.predicted_tokens - cached_tokens))

    def held(self, seconds: float) -> None:
        self.metrics.stage.of("regular", "dispatch_wait").observe(seconds)

    def outcome(self, worker: Worker, outcome: str) -> None:
        self.metrics.cb_outcomes.of(worker.url, outcome).add()

    def transport_error(self, kind: str) -> None:
        self.metrics.worker_errors.of("regular", "http", kind).add()

    def stream_broke(self, worker: Worker, outcome: str = "error_event") -> None:
        self.metrics.stream_breaks.of(worker.url, outcome).add()

    def client_left(self, path: str) -> None:
        self.metrics.client_disconnects.of(path).add()

    def admitted(self, result: str) -> None:
        self.metrics.rate_limit.of(result).add()

    def retried(self, path: str) -> None:
        self.metrics.retries.of("regular", path).add()

    def exhausted(self, path: str) -> None:
        self.metrics.retries_exhausted.of("regular", path).add()

    def pause(self, attempt: int, pause_s: float) -> None:
        self.metrics.backoff.of(str(attempt)).observe(pause_s)
