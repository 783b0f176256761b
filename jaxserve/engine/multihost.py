"""The hosts of one instance: how they meet, agree, follow host 0's plans, and end together.

Host 0 alone schedules. It listens on the port after `dist_init_addr`'s (that one is jax's own
coordinator's); every other host keeps one connection to it. Before jax joins the hosts they compare
their configurations, and later models, devices and programs: a difference is refused on every host
by its name. Afterwards either end of a connection notices when the other one is gone (at once) or
says nothing (within SILENCE_S), tells everybody who it was, and ends: no host waits in a collective
for one that will not come. jax's own watch takes 100 s and names nobody. Knows nothing of jax.
"""

import contextlib
import logging
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from jaxserve.config import ConfigError, ServerConfig
from jaxserve.engine.plan_stream import (
    Chain,
    End,
    Facts,
    Hello,
    Launch,
    Leave,
    Message,
    Peer,
    Plan,
    Program,
    StreamError,
    Verdict,
)
from jaxserve.version import __version__

logger = logging.getLogger(__name__)

BEAT_S = 1.0
SILENCE_S = 10.0  # longer than any pause of a healthy process, a tenth of jax's own heartbeat timeout
PARTING_S = 2.0  # how long host 0 waits for the others to read why it ends
HELLO_S = 5.0  # for a connection to say who it is

# What each host may have its own: where it listens and finds its files. Everything else must agree.
OWN_KEYS = frozenset(
    (
        *("model_path", "tokenizer_path", "served_model_name", "chat_template", "compile_cache_dir"),
        *("host", "port", "api_key", "cors_allowed_origins", "stream_interval", "max_queued_requests"),
        *("skip_tokenizer_init", "constrained_json_disable_any_whitespace", "reasoning_parser"),
        *("tool_call_parser", "sampling_defaults", "shutdown_grace_period_secs", "log_level"),
        *("log_requests", "base_gpu_id"),
        *("node_rank", "dist_init_addr", "dist_timeout", "follower_health_port"),
    )
)
SAME_PACKAGES = ("jax", "jaxlib", "flax")


def shared_keys(config: ServerConfig) -> dict[str, str]:
    """What of a configuration belongs to the engine, and not to a host, its files or its HTTP."""
    return {name: repr(value) for name, value in config.to_dict().items() if name not in OWN_KEYS}


def config_facts(config: ServerConfig) -> dict[str, str]:
    """What of a configuration and its software must be the same on every host.

    May take more than a second where packages lie on a slow disk.
    """
    facts = shared_keys(config)
    facts["python"] = ".".join(map(str, sys.version_info[:2]))
    facts["jaxserve"] = __version__  # of the code that runs, which need not be installed
    return facts | {name: _version(name) for name in SAME_PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def split_address(address: str) -> tuple[str, int]:
    """("10.0.0.1", 5000) of "10.0.0.1:5000". Raises ConfigError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65535:
        raise ConfigError(
            f"dist_init_addr={address} must be HOST:PORT with a port of 65534 or less (the next is used too)"
        )
    return host.strip("[]"), int(port)


@dataclass(frozen=True)
class Ending:
    """Why the hosts end, and whether that is as it should be."""

    reason: str
    clean: bool


OnEnd = Callable[[Ending], None]
"""Called once, from whichever thread notices, after the others were told: ends the process."""


class Leader:
    """Host 0's end of all connections."""

    rank = 0

    def __init__(self, on_end: OnEnd, on_leave: Callable[[str], None]):
        self._on_end, self._on_leave = on_end, on_leave
        self._chain = Chain()
        self._peers: dict[int, Peer] = {}
        self._facts: queue.SimpleQueue[tuple[int, Facts]] = queue.SimpleQueue()
        self._gone: dict[int, threading.Event] = {}
        self._once = _Once()

    def meet(self, config: ServerConfig, progress: Callable[[int, int], None]) -> None:
        """Wait for every follower, then compare configurations. Raises ConfigError."""
        assert config.dist_init_addr is not None
        host, port = split_address(config.dist_init_addr)
        hellos: queue.SimpleQueue[tuple[Peer, Hello]] = queue.SimpleQueue()
        facts: dict[int, dict[str, str]] = {}
        expected = range(1, config.nnodes)
        until_s = time.monotonic() + config.dist_timeout
        _watch(self._peers, self._lose)
        with _listen(host, port + 1) as listener, _woken(listener):
            threading.Thread(target=_accept, args=(listener, hellos), daemon=True).start()
            while len(self._peers) < len(expected):
                progress(1 + len(self._peers), config.nnodes)
                try:
                    peer, hello = hellos.get(timeout=max(until_s - time.monotonic(), 0))
                except queue.Empty:
                    missing = [str(r) for r in expected if r not in self._peers]
                    self._refuse(
                        "start",
                        f"host {' and '.join(missing)} of {config.nnodes} did not come to {host}:{port + 1} "
                        f"within dist_timeout={config.dist_timeout:g} s",
                    )
                if hello.rank not in expected or hello.rank in self._peers:
                    taken = "is there already" if hello.rank in self._peers else "does not exist"
                    refusal = f"node_rank={hello.rank} of nnodes={config.nnodes} {taken} ({peer.name})"
                    with contextlib.suppress(StreamError):
                        peer.send(Verdict("start", refusal))
                    self._refuse("start", refusal)
                peer.name = f"host {hello.rank} ({peer.name})"
                self._peers[hello.rank], facts[hello.rank] = peer, hello.facts
                self._gone[hello.rank] = threading.Event()
                threading.Thread(target=self._read, args=(hello.rank, peer), daemon=True).start()
        progress(config.nnodes, config.nnodes)
        self._judge("start", config_facts(config), facts)

    def agree(self, stage: str, same: dict[str, str], least: dict[str, int] | None = None) -> dict[str, int]:
        """Wait until every host is at this stage. Returns the least of each count over the hosts.

        Raises ConfigError on every host when one of `same` differs.
        """
        theirs: dict[int, dict[str, str]] = {}
        counts = [least or {}]
        while len(theirs) < len(self._peers):
            rank, facts = self._facts.get()
            if facts.stage != stage:
                self.fail(f"host {rank} is at {facts.stage!r}, host 0 at {stage!r}")
            theirs[rank] = facts.same
            counts.append(facts.least)
        smallest = {name: min(c[name] for c in counts) for name in counts[0]}
        self._judge(stage, same, theirs, smallest)
        return smallest

    def send(self, launches: list[Launch]) -> None:
        """Tell every follower what this host launches next; call it before launching."""
        self._tell(self._chain.seal(launches))

    def share(self, programs: Iterable[Program]) -> None:
        """Give every follower what was compiled here."""
        for program in programs:
            self._tell(program)

    def fail(self, reason: str) -> None:
        """This host cannot go on: tell the others, then end. Does not return in a real engine."""
        self._end(Ending(f"host 0: {reason}", clean=False))

    def give_up(self, reason: str) -> None:
        """Tell the others, unless they know, and come back: the caller ends."""
        self._once(lambda: self._part(End(f"host 0: {reason}")))

    def stop(self) -> None:
        """Told to stop before there is anything to drain."""
        self.close("host 0 was told to stop")

    def close(self, reason: str) -> None:
        """A clean end, after the last plan; `on_end` is called once the followers are gone."""
        self._end(Ending(reason, clean=True))

    # ---- threads ----

    def _read(self, rank: int, peer: Peer) -> None:
        try:
            while True:
                match message := peer.receive():
                    case Facts():
                        self._facts.put((rank, message))
                    case Leave():
                        self._on_leave(f"host {rank} was told to stop")
                    case End():
                        self._gone[rank].set()
                        return self._lose(message.reason)
        except StreamError as error:
            self._gone[rank].set()
            self._lose(str(error))

    def _lose(self, reason: str) -> None:
        self._end(Ending(reason, clean=False))

    def _end(self, ending: Ending) -> None:
        def tell() -> None:
            self._part(End(ending.reason, ending.clean))
            self._on_end(ending)

        self._once(tell)

    # ---- the start ----

    def _judge(
        self,
        stage: str,
        mine: dict[str, str],
        theirs: dict[int, dict[str, str]],
        least: dict[str, int] | None = None,
    ) -> None:
        found = [text for rank in sorted(theirs) for text in differences(mine, theirs[rank], rank)]
        if found:
            shown = found[:4] + [f"{len(found) - 4} more"] * (len(found) > 4)
            self._refuse(stage, "the hosts do not agree: " + "; ".join(shown))
        self._tell(Verdict(stage, None, least or {}))

    def _tell(self, message: Message) -> None:
        for peer in self._peers.values():
            try:
                peer.send(message)
            except StreamError as error:
                self._lose(str(error))

    def _refuse(self, stage: str, refusal: str) -> None:
        def tell() -> None:
            self._part(Verdict(stage, refusal))

        self._once(tell)  # that the others leave is now no news
        raise ConfigError(refusal)

    def _part(self, last: Message) -> None:
        """Say a last thing to everyone and give them a moment to be gone: jax aborts whoever outlives
        host 0, without a name."""
        for peer in self._peers.values():
            with contextlib.suppress(StreamError):
                peer.send(last)
        until_s = time.monotonic() + PARTING_S
        for gone in self._gone.values():
            gone.wait(max(until_s - time.monotonic(), 0))


class Follower:
    """Another host's end of its connection to host 0."""

    def __init__(self, rank: int, on_end: OnEnd):
        self.rank = rank
        self._on_end = on_end
        self._chain = Chain()
        self._verdicts: queue.SimpleQueue[Verdict] = queue.SimpleQueue()
        self._plans: queue.SimpleQueue[Plan | None] = queue.SimpleQueue()
        self.shared: queue.SimpleQueue[Program] = queue.SimpleQueue()  # all that came before a verdict
        self._once = _Once()
        self._peer: Peer | None = None
        self._starting = True

    def meet(self, config: ServerConfig, progress: Callable[[int, int], None]) -> None:
        """Find host 0 and compare configurations. Raises ConfigError."""
        assert config.dist_init_addr is not None
        host, port = split_address(config.dist_init_addr)
        facts = config_facts(config)  # before connecting: host 0 waits HELLO_S for it, and no longer
        until_s = time.monotonic() + config.dist_timeout
        sock = _connect(host, port + 1, until_s, config)
        peer = self._peer = Peer(sock, f"host 0 ({host}:{port + 1})", SILENCE_S)
        self._send(Hello(self.rank, facts))  # before the first beat: who begins otherwise is a stranger
        threading.Thread(target=self._read, args=(peer,), daemon=True).start()
        _watch({0: peer}, self._lose)
        progress(1, config.nnodes)
        self._verdict("start")
        progress(config.nnodes, config.nnodes)

    def agree(self, stage: str, same: dict[str, str], least: dict[str, int] | None = None) -> dict[str, int]:
        """As `Leader.agree`."""
        self._send(Facts(stage, same, least or {}))
        return self._verdict(stage)

    def plans(self) -> Iterator[list[Launch]]:
        """What to launch, as it comes; ends when host 0 ends as it should."""
        self._starting = False
        while (plan := self._plans.get()) is not None:
            try:
                self._chain.check(plan)
            except StreamError as error:
                self.fail(str(error))
                return
            yield plan.launches

    def stop(self) -> None:
        """This host was told to stop: ask host 0 that all do, after what runs."""
        if self._peer is None:
            self.close(f"host {self.rank} was told to stop before it found host 0")
        else:
            self._send(Leave())

    def fail(self, reason: str) -> None:
        """As `Leader.fail`."""
        self._lose(f"host {self.rank}: {reason}")

    def give_up(self, reason: str) -> None:
        """As `Leader.give_up`."""
        self._once(lambda: self._tell_end(f"host {self.rank}: {reason}"))

    def close(self, reason: str) -> None:
        """After the last plan."""
        self._once(lambda: self._on_end(Ending(reason, clean=True)))

    def _verdict(self, stage: str) -> dict[str, int]:
        verdict = self._verdicts.get()
        if verdict.refusal is not None:
            self._once(lambda: None)
            raise ConfigError(verdict.refusal)
        if verdict.stage != stage:
            self.fail(f"host 0 is at {verdict.stage!r}, this host at {stage!r}")
        return verdict.least

    def _send(self, message: Message) -> None:
        assert self._peer is not None
        try:
            self._peer.send(message)
        except StreamError as error:
            self._lose(str(error))

    def _read(self, peer: Peer) -> None:
        try:
            while True:
                match message := peer.receive():
                    case Verdict():
                        self._verdicts.put(message)
                    case Program():
                        self.shared.put(message)
                    case Plan():
                        self._plans.put(message)
                    case End(reason, clean):
                        if not clean:
                            return self._lose(reason)
                        return self.close(reason) if self._starting else self._plans.put(None)
        except StreamError as error:
            self._lose(str(error))

    def _lose(self, reason: str) -> None:
        def tell() -> None:
            self._tell_end(reason)
            self._on_end(Ending(reason, clean=False))

        self._once(tell)

    def _tell_end(self, reason: str) -> None:
        if self._peer is not None:
            with contextlib.suppress(StreamError):
                self._peer.send(End(reason))


Hosts = Leader | Follower
"""This host's view of the others."""


def differences(mine: dict[str, str], theirs: dict[str, str], rank: int) -> list[str]:
    """One text for each fact in which host `rank` differs from host 0."""
    return [
        f"host {rank} has {key}={theirs.get(key, 'unknown')}, host 0 has {key}={mine.get(key, 'unknown')}"
        for key in sorted({*mine, *theirs})
        if mine.get(key) != theirs.get(key)
    ]


class _Once:
    """Lets the first ending through; whoever comes later waits until it has ended the process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._over = False

    def __call__(self, end: Callable[[], None]) -> None:
        with self._lock:
            if not self._over:
                self._over = True
                end()


def _watch(peers: dict[int, Peer], lose: Callable[[str], None]) -> None:
    """Send signs of life, and miss those of others, for as long as the process lives; peers may be added."""

    def watch() -> None:
        while True:
            time.sleep(BEAT_S)
            for peer in list(peers.values()):
                silent_s = time.monotonic() - peer.last_heard_s
                if silent_s > SILENCE_S:
                    return lose(f"{peer.name} gave no sign of life for {silent_s:.0f} s")
            for peer in list(peers.values()):
                try:
                    peer.beat()
                except StreamError as error:
                    return lose(str(error))

    threading.Thread(target=watch, daemon=True).start()


def _listen(host: str, port: int) -> socket.socket:
    """On the named address alone where that is this machine's; behind a translated one on all."""
    try:
        [(family, _, _, _, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        try:
            return socket.create_server(address[:2], family=family)
        except OSError:
            return socket.create_server(("", port))
    except OSError as error:
        raise ConfigError(
            f"dist_init_addr: host 0 cannot listen on {host}:{port}: {error.strerror or error}"
        ) from error


@contextlib.contextmanager
def _woken(listener: socket.socket) -> Iterator[None]:
    """Ends a thread's `accept` at the end; closing alone would let it wait, and take one more."""
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)


def _accept(listener: socket.socket, hellos: "queue.SimpleQueue[tuple[Peer, Hello]]") -> None:
    """Take connections until the listener is closed. A stranger's is closed again, not the instance's end."""

    def introduce(sock: socket.socket, name: str) -> None:
        peer = Peer(sock, name, SILENCE_S)
        timer = threading.Timer(HELLO_S, peer.close)
        timer.daemon = True
        timer.start()
        try:
            hello = peer.receive()
            if not isinstance(hello, Hello):
                raise StreamError(f"{name} began with {type(hello).__name__}")
            hellos.put((peer, hello))
        except StreamError as error:
            logger.warning("a connection that is no host's: %s", error)
            peer.close()
        finally:
            timer.cancel()

    while True:
        try:
            sock, address = listener.accept()
        except OSError:
            return
        threading.Thread(target=introduce, args=(sock, address[0]), daemon=True).start()


def _connect(host: str, port: int, until_s: float, config: ServerConfig) -> socket.socket:
    while True:
        try:
            return socket.create_connection((host, port), timeout=SILENCE_S)
        except OSError as error:
            if time.monotonic() > until_s:
                raise ConfigError(
                    f"host {config.node_rank}: host 0 does not answer at {host}:{port} within "
                    f"dist_timeout={config.dist_timeout:g} s: {error.strerror or error}; is it up, and is "
                    f"dist_init_addr={config.dist_init_addr} the same there?"
                ) from error
        time.sleep(0.5)  # it may be minutes until its machine is up
