"""`python -m jaxserve.launch_server --model-path M ...`: serve a model over HTTP."""

import asyncio
import sys
from collections.abc import Sequence

from jaxserve.config import ConfigError, ServerConfig
from jaxserve.launch import run
from jaxserve.logs import start_logging


def main(argv: Sequence[str] | None = None) -> int:
    config = ServerConfig.from_command_line(argv, prog="python -m jaxserve.launch_server")
    start_logging("http", config.log_level)
    try:
        return asyncio.run(run(config))
    except ConfigError as error:
        print(f"jaxserve: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
