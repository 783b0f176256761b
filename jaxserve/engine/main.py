"""The engine process: `python -m jaxserve.engine.main ADDRESS`, started by the launcher.

Standard input is the lifeline to the launcher (see `jaxserve.lifeline`), and its first line is the
configuration as JSON. When the launcher dies this process ends too. Of several hosts every one has
an engine process; whoever cannot go on tells the others and the launcher why, and ends.
"""

import contextlib
import gc
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import zmq

from jaxserve.config import ConfigError, ServerConfig
from jaxserve.engine.multihost import SILENCE_S, Ending, Follower, Hosts, Leader
from jaxserve.lifeline import Lifeline
from jaxserve.logs import start_logging
from jaxserve.messages import Fatal, Progress
from jaxserve.transport import ZmqEndpoint

logger = logging.getLogger(__name__)

ECHO_S = 2.0  # a collective fails before the connection has told which host is gone


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher decides when to end
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    lifeline = Lifeline(socket.socket(fileno=os.dup(sys.stdin.fileno())))
    config = ServerConfig.from_keywords(**json.loads(lifeline.first_line()))
    name = f"engine {config.node_rank}" if config.nnodes > 1 else "engine"
    start_logging(name, config.log_level)
    endpoint = ZmqEndpoint(sys.argv[1])
    hosts = _hosts(config, lifeline)
    _hold(lifeline, hosts, Path(sys.argv[1].removeprefix("ipc://")))
    try:
        _serve(config, endpoint, hosts)
        status = 0
    except Exception as error:
        from jaxserve.weights import CheckpointError

        expected = isinstance(error, ConfigError | CheckpointError)
        if not expected:
            logger.exception("the engine failed")
        text = str(error) or repr(error)
        if hosts is not None:
            if not expected:
                time.sleep(ECHO_S)  # the connection's thread may know better, and end first
            hosts.give_up(text)
        endpoint.send(Fatal("config" if expected else "internal", text))
        status = 2 if expected else 1
    finally:
        endpoint.close()
    if hosts is not None:
        zmq.Context.instance().term()  # what was sent has arrived
        if status == 0:
            hosts.close("every request is answered")
        os._exit(status)  # jax would wait for the other hosts, also for those that are gone
    return status


def _hosts(config: ServerConfig, lifeline: Lifeline) -> Hosts | None:
    def end(ending: Ending) -> None:
        lifeline.say(f"end {ending.reason}")
        os._exit(0 if ending.clean else 1)

    if config.nnodes == 1:
        return None
    if config.node_rank:
        return Follower(config.node_rank, end)
    return Leader(end, lambda reason: lifeline.say(f"stop {reason}"))


def _hold(lifeline: Lifeline, hosts: Hosts | None, place: Path) -> None:
    """From now on end with the launcher, whose socket is in `place`; of several hosts, end a frozen one."""
    launcher = os.getppid()

    def heard(line: str) -> None:
        if line == "stop" and hosts is not None:
            hosts.stop()

    def lost(what: str) -> None:
        reason = "its launcher died"
        if what != "closed":
            if os.getppid() == launcher:
                os.kill(launcher, signal.SIGKILL)
            reason = f"its launcher was frozen ({what}) and was killed"
        with contextlib.suppress(OSError):
            place.unlink()
            place.parent.rmdir()  # unless there are other engines' sockets
        if hosts is not None:
            hosts.fail(reason)
        os._exit(3)

    lifeline.start(heard, lost, None if hosts is None else SILENCE_S)


def _serve(config: ServerConfig, endpoint: ZmqEndpoint, hosts: Hosts | None) -> None:
    if hosts is not None:
        hosts.meet(config, lambda done, total: endpoint.send(Progress("waiting for hosts", done, total)))

    from jaxserve.engine.build import build, prepare_devices
    from jaxserve.engine.follow import announce_to, follow, join_jax
    from jaxserve.engine.loop import EngineLoop

    prepare_devices(config)
    if hosts is not None:
        join_jax(config)
    scheduler, runner, info, stats, constraints = build(config, endpoint.send, hosts)
    # What lives until the end is looked through no more: a full collection held a step up by 0.3 s.
    gc.collect()
    gc.freeze()
    endpoint.send(info)
    if isinstance(hosts, Follower):
        stats.loop_thread = threading.get_ident()
        return follow(hosts, runner)
    if isinstance(hosts, Leader):
        announce_to(hosts, runner)
    EngineLoop(scheduler, runner, endpoint, info, stats, constraints).run()


if __name__ == "__main__":
    sys.exit(main())
