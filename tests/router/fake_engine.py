"""An engine process for the co-launcher's tests: `python -m fake_engine --port P ...`."""

import argparse
import asyncio
import json
import os
import signal
import sys

from mock_worker import MockWorker


async def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--port", type=int)
    parser.add_argument("--dp-size", type=int)
    parser.add_argument("--base-gpu-id", type=int)
    parser.add_argument("--note")  # a directory in which it leaves its flags and process id
    given, rest = parser.parse_known_args()
    if "--refuse" in rest:
        parser.error("unknown flag --refuse")
    with open(os.path.join(given.note, f"{given.port}.json"), "w") as file:  # noqa: ASYNC230
        json.dump({"pid": os.getpid(), "flags": sys.argv[1:], "gpu": given.base_gpu_id}, file)
    worker = await MockWorker(port=given.port, info={"dp_size": given.dp_size}).start()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    print("ready", worker.url, flush=True)
    await stop.wait()


asyncio.run(main())
