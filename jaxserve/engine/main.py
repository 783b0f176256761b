"""The engine process: `python -m jaxserve.engine.main ADDRESS`, started by the launcher.

The configuration comes as one JSON line on standard input. Standard input then stays open as a
lifeline: when the launcher dies, it closes, and this process ends too.
"""

import json
import logging
import os
import signal
import sys
import threading

from jaxserve.config import ConfigError, ServerConfig
from jaxserve.messages import Fatal
from jaxserve.transport import ZmqEndpoint


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher decides when to end
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    config = ServerConfig.from_keywords(**json.loads(sys.stdin.readline()))
    logging.basicConfig(
        level=config.log_level.upper(), format="%(asctime)s engine %(levelname)s %(name)s: %(message)s"
    )
    threading.Thread(target=_die_with_launcher, daemon=True).start()
    endpoint = ZmqEndpoint(sys.argv[1])
    try:
        _serve(config, endpoint)
        return 0
    except Exception as error:
        from jaxserve.weights import CheckpointError

        expected = isinstance(error, ConfigError | CheckpointError)
        if not expected:
            logging.getLogger(__name__).exception("the engine failed")
        endpoint.send(Fatal("config" if expected else "internal", str(error) or repr(error)))
        return 2 if expected else 1
    finally:
        endpoint.close()


def _serve(config: ServerConfig, endpoint: ZmqEndpoint) -> None:
    from jaxserve.engine.build import build, prepare_devices
    from jaxserve.engine.loop import EngineLoop

    prepare_devices(config)
    scheduler, runner, info, stats = build(config, endpoint.send)
    endpoint.send(info)
    EngineLoop(scheduler, runner, endpoint, info, stats).run()


def _die_with_launcher() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os._exit(3)


if __name__ == "__main__":
    sys.exit(main())
