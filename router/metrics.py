"""Counters, gauges and histograms in Prometheus text format, cheap enough for every request.

One event loop owns them, so there are no locks: a bound cell's `add` is one float addition (0.1 us,
against 1 to 2 us of a thread-safe client library, eight times a request).
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

Labels = tuple[str, ...]
# What one process counted: by name the kind and, by labels, the values: one number, or a histogram's
# counts and sum.
Snapshot = dict[str, tuple[str, list[tuple[Labels, list[float]]]]]
Merge = Literal["sum", "max", "own"]

LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKEN_BUCKETS = (0, 16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


class Cell:
    """One labelled number."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def add(self, amount: float = 1.0) -> None:
        self.value += amount


class HistogramCell:
    """One labelled distribution: `counts[i]` observations in (bounds[i-1], bounds[i]], the last above all."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class Counter:
    kind = "counter"

    def __init__(self, name: str, help: str, labels: Labels = ()) -> None:
        self.name, self.help, self.labels = name, help, labels
        self.cells: dict[Labels, Cell] = {}
        if not labels:
            self.cells[()] = Cell()

    def of(self, *values: str) -> Cell:
        """The cell of these label values; keep it where it is used often."""
        cell = self.cells.get(values)
        if cell is None:
            assert len(values) == len(self.labels), (self.name, values, self.labels)
            cell = self.cells[values] = Cell()
        return cell

    def state(self) -> list[tuple[Labels, list[float]]]:
        return [(labels, [cell.value]) for labels, cell in self.cells.items()]

    def samples(self, others: Iterable[tuple[Labels, list[float]]] = ()) -> Iterable[str]:
        values = {labels: cell.value for labels, cell in self.cells.items()}
        for labels, (value,) in others:
            values[labels] = values.get(labels, 0.0) + value
        for labels, value in values.items():
            yield f"{self.name}{label_text(self.labels, labels)} {number_text(value)}"


class Gauge(Counter):
    """A value that is set, or read at scrape time from `read() -> {label values: value}`."""

    kind = "gauge"

    def __init__(
        self,
        name: str,
        help: str,
        labels: Labels = (),
        read: Callable[[], dict[Labels, float]] | None = None,
        merge: Merge = "own",
    ) -> None:
        super().__init__(name, help, labels)
        self.read = read
        self.merge = merge  # of the values that the processes of one gateway have

    def state(self) -> list[tuple[Labels, list[float]]]:
        if self.read is None:
            return super().state()
        return [(labels, [value]) for labels, value in self.read().items()]

    def samples(self, others: Iterable[tuple[Labels, list[float]]] = ()) -> Iterable[str]:
        values = {labels: value for labels, (value,) in self.state()}
        if self.merge != "own":
            for labels, (value,) in others:
                before = values.get(labels, 0.0)
                values[labels] = max(before, value) if self.merge == "max" else before + value
        for labels, value in values.items():
            yield f"{self.name}{label_text(self.labels, labels)} {number_text(value)}"


class Histogram:
    kind = "histogram"

    def __init__(
        self, name: str, help: str, labels: Labels = (), bounds: tuple[float, ...] = LATENCY_BUCKETS_S
    ) -> None:
        self.name, self.help, self.labels, self.bounds = name, help, labels, bounds
        self.cells: dict[Labels, HistogramCell] = {}
        if not labels:
            self.cells[()] = HistogramCell(bounds)

    def of(self, *values: str) -> HistogramCell:
        cell = self.cells.get(values)
        if cell is None:
            assert len(values) == len(self.labels), (self.name, values, self.labels)
            cell = self.cells[values] = HistogramCell(self.bounds)
        return cell

    def state(self) -> list[tuple[Labels, list[float]]]:
        return [(labels, [*cell.counts, cell.total]) for labels, cell in self.cells.items()]

    def samples(self, others: Iterable[tuple[Labels, list[float]]] = ()) -> Iterable[str]:
        names = (*self.labels, "le")
        all_values = dict(self.state())
        for labels, more in others:
            before = all_values.get(labels)
            all_values[labels] = (
                more if before is None else [a + b for a, b in zip(before, more, strict=True)]
            )
        for values, (*counts, total) in all_values.items():
            running = 0
            limits = [*(f"{bound:g}" for bound in self.bounds), "+Inf"]
            for text, count in zip(limits, counts, strict=True):
                running += int(count)
                yield f"{self.name}_bucket{label_text(names, (*values, text))} {running}"
            labels = label_text(self.labels, values)
            yield f"{self.name}_sum{labels} {number_text(total)}"
            yield f"{self.name}_count{labels} {running}"


def number_text(value: float) -> str:
    """Every digit: with six, a counter of millions moves in steps."""
    return str(int(value)) if abs(value) < 1 << 53 and value == int(value) else repr(float(value))


def label_text(names: Labels, values: Labels) -> str:
    """`{a="x",b="y"}` with the values escaped; empty without labels."""
    if not names:
        return ""
    escaped = (v.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") for v in values)
    return "{" + ",".join(f'{n}="{v}"' for n, v in zip(names, escaped, strict=True)) + "}"


class Metrics:
    """Every metric of the gateway, by attribute. Gauges that mirror state are added by `watch`."""

    def __init__(self) -> None:
        self.all: list[Counter | Histogram] = []
        c, h = self.counter, self.histogram
        self.http_requests = c("smg_http_requests_total", "HTTP requests", "method", "path")
        self.http_responses = c(
            "smg_http_responses_total", "HTTP responses", "path", "status_code", "error_code"
        )
        self.http_duration = h("smg_http_request_duration_seconds", "time to the last byte", "method", "path")
        self.rate_limit = c("smg_http_rate_limit_total", "admission decisions", "result")
        self.requests = c(
            "smg_router_requests_total",
            "requests routed to workers",
            "router_type", "backend_type", "connection_mode", "model", "endpoint", "streaming",
        )  # fmt: skip
        self.duration = h(
            "smg_router_request_duration_seconds",
            "time from the request's last byte to the answer's last",
            "router_type", "backend_type", "connection_mode", "model", "endpoint",
        )  # fmt: skip
        self.errors = c(
            "smg_router_request_errors_total",
            "requests that the gateway answered with an error",
            "router_type", "backend_type", "connection_mode", "model", "endpoint", "error_type",
        )  # fmt: skip
        self.upstream_responses = c(
            "smg_router_upstream_responses_total",
            "answers of workers that clients got",
            "router_type", "status_code", "error_code",
        )  # fmt: skip
        self.stage = h(
            "smg_router_stage_duration_seconds", "time in one stage of routing", "router_type", "stage",
            bounds=(0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.01, 0.1, 1, 10),
        )  # fmt: skip
        self.ttft = h(
            "smg_router_ttft_seconds", "time to a stream's first byte",
            "router_type", "backend_type", "model", "endpoint",
        )  # fmt: skip
        self.itl = h(
            "smg_router_itl_seconds", "time between two reads of a stream",
            "router_type", "backend_type", "model", "endpoint",
        )  # fmt: skip
        self.tpot = h(
            "smg_router_tpot_seconds", "time per token of a stream after its first",
            "router_type", "backend_type", "model", "endpoint",
        )  # fmt: skip
        self.generation = h(
            "smg_router_generation_duration_seconds", "time from a stream's request to its end",
            "router_type", "backend_type", "model", "endpoint",
        )  # fmt: skip
        self.tokens = c(
            "smg_router_tokens_total", "tokens as the workers report them",
            "router_type", "backend_type", "model", "endpoint", "token_type",
        )  # fmt: skip
        self.selection = c(
            "smg_worker_selection_total", "choices of a worker",
            "worker_type", "connection_mode", "model", "policy",
        )  # fmt: skip
        self.decisions = c("router_decisions_total", "choices of a worker by reason", "policy", "reason")
        self.predicted_tokens = c("router_predicted_cached_tokens_total", "cached tokens expected", "worker")
        self.actual_tokens = c("router_actual_cached_tokens_total", "cached tokens reported", "worker")
        self.prediction_error = h(
            "router_cached_tokens_error", "absolute error of the expected cached tokens",
            bounds=TOKEN_BUCKETS,
        )  # fmt: skip
        self.worker_requests = c("smg_worker_requests_total", "requests sent to a worker", "worker", "model")
        self.worker_errors = c(
            "smg_worker_errors_total", "exchanges that failed", "worker_type", "connection_mode", "error_type"
        )
        self.health_checks = c("smg_worker_health_checks_total", "probes", "worker_type", "result")
        self.cb_transitions = c(
            "smg_worker_cb_transitions_total", "circuit breaker transitions", "worker", "from", "to"
        )
        self.cb_outcomes = c("smg_worker_cb_outcomes_total", "outcomes the breaker saw", "worker", "outcome")
        self.retries = c("smg_worker_retries_total", "further attempts", "worker_type", "endpoint")
        self.retries_exhausted = c(
            "smg_worker_retries_exhausted_total", "requests out of attempts", "worker_type", "endpoint"
        )
        self.backoff = h("smg_worker_retry_backoff_seconds", "pause before an attempt", "attempt")
        self.readmissions = c(
            "smg_worker_cb_health_readmissions_total", "breakers closed because the worker is well again",
            "worker",
        )  # fmt: skip
        self.stream_breaks = c("router_stream_breaks_total", "streams a worker broke", "worker", "outcome")
        self.client_disconnects = c("router_client_disconnects_total", "clients that left early", "path")
        self.registrations = c("smg_discovery_registrations_total", "workers registered", "source", "result")
        self.deregistrations = c(
            "smg_discovery_deregistrations_total", "workers unregistered", "source", "reason"
        )

        self.discovery_sync = h("smg_discovery_sync_duration_seconds", "one reconciliation", "source")

    def counter(self, name: str, help: str, *labels: str) -> Counter:
        metric = Counter(name, help, labels)
        self.all.append(metric)
        return metric

    def histogram(
        self, name: str, help: str, *labels: str, bounds: tuple[float, ...] = LATENCY_BUCKETS_S
    ) -> Histogram:
        metric = Histogram(name, help, labels, bounds)
        self.all.append(metric)
        return metric

    def watch(
        self,
        name: str,
        help: str,
        labels: Labels,
        read: Callable[[], dict[Labels, float]],
        merge: Merge = "own",
    ) -> None:
        """A gauge whose samples are read from live state when it is scraped."""
        self.all.append(Gauge(name, help, labels, read, merge))

    def snapshot(self) -> Snapshot:
        """Everything counted here, for a supervisor to add up."""
        return {metric.name: (metric.kind, metric.state()) for metric in self.all}

    def text(self, others: Iterable[Snapshot] = ()) -> bytes:
        """The exposition, version 0.0.4, with what other processes counted added.

        Every name has its HELP and TYPE line even without samples.
        """
        others = list(others)
        lines = []
        for metric in self.all:
            lines.append(f"# HELP {metric.name} {metric.help}")
            lines.append(f"# TYPE {metric.name} {metric.kind}")
            lines.extend(metric.samples([s for o in others if metric.name in o for s in o[metric.name][1]]))
        return ("\n".join(lines) + "\n").encode()


def joined(texts: Sequence[tuple[str, str]]) -> str:
    """The metrics of several workers (URL, text) as one text: a family once, a `worker` label at each sample.

    Without the label, the same samples of two workers would be one, and the text none that Prometheus reads.
    """
    families: dict[str, tuple[list[str], list[str]]] = {}  # name -> (comments, samples)
    for url, text in texts:
        label, own = label_text(("worker",), (url,))[1:-1], set[str]()
        comments, samples = families.setdefault("", ([], []))
        for line in text.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                name = line.split(" ", 3)[2]
                comments, samples = families.setdefault(name, ([], []))
                if name in own or not comments:  # the first worker's words stand for all
                    own.add(name)
                    comments.append(line)
            elif line and not line.startswith("#"):
                name, brace, rest = line.partition("{")
                if brace and " " not in name:
                    samples.append(f"{name}{{{label}{',' * (rest[:1] != '}')}{rest}")
                else:
                    name, _, rest = line.partition(" ")
                    samples.append(f"{name}{{{label}}} {rest}")
    return "".join(f"{line}\n" for parts in families.values() for part in parts for line in part)
