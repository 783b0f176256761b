"""`python -m jaxserve.launch_server --model-path M ...`: serve a model over HTTP."""

import asyncio
import logging
import sys
from collections.abc import Sequence

from jaxserve.config import ConfigError, ServerConfig
from jaxserve.full_disk import forget_unwritten_output
from jaxserve.launch import run


def main(argv: Sequence[str] | None = None) -> int:
    config = ServerConfig.from_command_line(argv, prog="python -m jaxserve.launch_server")
    forget_unwritten_output()
    logging.basicConfig(
        level=config.log_level.upper(), format="%(asctime)s http %(levelname)s %(name)s: %(message)s"
    )
    try:
        return asyncio.run(run(config))
    except ConfigError as error:
        print(f"jaxserve: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
