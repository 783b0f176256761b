"""Hub ids against a small hub on this machine: what is fetched, and what a refusal says."""

import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import numpy as np
import pytest
from huggingface_hub import constants

from jaxserve.config import ConfigError, ServerConfig
from jaxserve.engine import build
from jaxserve.weights import CheckpointError, open_checkpoint
from tests.models.tiny import GOLDEN
from tests.weights.tiny import write_directory

COMMIT = "c0ffee" + "0" * 34
TOKEN = "hf_letmein"


class Hub(ThreadingHTTPServer):
    """The part of the hub's API that fetching a snapshot takes, for a handful of repositories."""

    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.fetched = []
        self.endpoint = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        url = urlsplit(self.path)
        parts = url.path.strip("/").split("/")
        if len(parts) < 4:
            return self.refuse(404, None, "Not Found")
        is_api = parts[0] == "api"
        owner, name, kind, *rest = parts[2:] if is_api else parts
        repo, is_known = f"{owner}/{name}", self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo == "acme/private" and not is_known:
            return self.refuse(401, "RepoNotFound", "Repository not found")
        if repo == "acme/gated" and not is_known and not (is_api and kind == "revision"):
            return self.refuse(403, "GatedRepo", "Access to model acme/gated is restricted")
        if repo == "acme/broken":
            return self.refuse(500, None, "Internal Error")
        if repo not in ("acme/tiny", "acme/private", "acme/gated", "acme/pickled"):
            return self.refuse(404, "RepoNotFound", "Repository not found")
        if rest[0] not in ("main", COMMIT):
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        files = self.server.files
        if repo == "acme/pickled":
            files = {name: data for name, data in files.items() if not name.endswith(".safetensors")}
        if is_api and kind == "revision":
            siblings = [{"rfilename": name} for name in files]
            return self.send_json({"id": repo, "sha": COMMIT, "siblings": siblings}, body)
        if is_api and kind == "tree":
            assert "recursive" in url.query, self.path
            entries = [{"type": "file", "path": n, "size": len(d), "oid": oid(d)} for n, d in files.items()]
            return self.send_json(entries, body)
        assert kind == "resolve", self.path
        data = files["/".join(rest[1:])]
        if body:
            self.server.fetched.append("/".join(rest[1:]))
        self.send_response(200)
        self.send_header("ETag", f'"{oid(data)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def refuse(self, status, code, message):
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_json(self, value, body):
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)


def oid(data):
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    folder = write_directory(tmp_path / "repo", {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3)})
    files = {entry.name: entry.read_bytes() for entry in folder.iterdir()}
    files |= {
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
        "tokenizer_config.json": b"{ }",
    }
    unwanted = (
        "README.md",
        "pytorch_model.bin",
        "original/consolidated.safetensors",
        "consolidated.safetensors",
    )
    files |= dict.fromkeys(unwanted, b"not needed")
    server = Hub(files)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    yield server
    server.shutdown()
    server.server_close()


def test_a_hub_id_fetches_what_serving_needs_and_nothing_else(hub):
    checkpoint = open_checkpoint("acme/tiny")
    np.testing.assert_array_equal(checkpoint.read("a.weight"), [[0, 1, 2], [3, 4, 5]])
    assert checkpoint.config == {"architectures": ["LlamaForCausalLM"]}
    assert sorted(hub.fetched) == [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_what_is_not_served_is_refused_before_its_weights_are_fetched(hub):
    """The hub's model has a config.json that lacks everything; another a tokenizer that is none."""
    config = ServerConfig.from_keywords(model_path="acme/tiny", device="cpu")
    with pytest.raises(ConfigError, match=r"config\.json: \w+ is missing"):
        build._open(config)
    config_json = (GOLDEN / "llama" / "config.json").read_bytes()
    hub.files = {**hub.files, "config.json": config_json, "tokenizer.json": b"{}"}
    shutil.rmtree(constants.HF_HUB_CACHE)
    with pytest.raises(ConfigError, match=r"tokenizer\.json.*--skip-tokenizer-init serves token ids"):
        build._open(config)
    assert "model.safetensors" not in hub.fetched
    opened = build._open(ServerConfig.from_keywords(model_path="acme/tiny", skip_tokenizer_init=True))
    assert list(opened.checkpoint.tensors) == ["a.weight"]
    assert build._open(config).checkpoint is not None  # nothing is to be fetched, so nothing is checked yet


def test_a_repository_of_gguf_files_is_told_what_to_do_instead(hub):
    hub.files = {"model.gguf": b"GGUF"}
    with pytest.raises(CheckpointError, match="acme/tiny: has no safetensors files; for GGUF download"):
        build._open(ServerConfig.from_keywords(model_path="acme/tiny"))


def test_a_second_opening_fetches_nothing(hub):
    open_checkpoint("acme/tiny")
    hub.fetched.clear()
    open_checkpoint("acme/tiny")
    assert hub.fetched == []


def test_a_fetched_model_opens_while_the_hub_is_away(hub):
    open_checkpoint("acme/tiny")
    hub.shutdown()
    hub.server_close()
    assert "a.weight" in open_checkpoint("acme/tiny").tensors


def test_a_local_directory_of_that_name_is_not_looked_up(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_directory(tmp_path / "acme" / "tiny", {"local": np.ones(2, np.float32)})
    assert list(open_checkpoint("acme/tiny").tensors) == ["local"]
    assert hub.fetched == []


@pytest.mark.parametrize("repo", ["acme/private", "acme/gated"])
def test_a_token_opens_private_and_gated_models(hub, monkeypatch, repo):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert list(open_checkpoint(repo).tensors) == ["a.weight"]


def test_a_gated_model_says_whose_token_is_needed(hub):
    with pytest.raises(
        CheckpointError,
        match=r"acme/gated: gated at .*; accept its terms .* set HF_TOKEN to a token of the same account "
        r"with read access to acme/gated \(no token is set\)",
    ):
        open_checkpoint("acme/gated")


def test_a_private_or_missing_model_says_which_token_would_help(hub, monkeypatch):
    for repo in ("acme/private", "acme/missing"):
        with pytest.raises(
            CheckpointError,
            match=rf"{repo}: not a local path, and at {hub.endpoint} it does not exist or is private; .* "
            rf"HF_TOKEN to a token with read access to {repo} \(no token is set\)",
        ):
            open_checkpoint(repo)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(CheckpointError, match="the token in use has no access"):
        open_checkpoint("acme/private")


def test_an_unknown_revision_is_named(hub):
    with pytest.raises(CheckpointError, match="acme/tiny: has no revision 'v9'"):
        open_checkpoint("acme/tiny", revision="v9")


def test_a_model_without_safetensors_is_refused(hub):
    with pytest.raises(CheckpointError, match="acme/pickled: has no safetensors files"):
        open_checkpoint("acme/pickled")


def test_a_hub_that_fails_or_cannot_be_reached_is_said_so(hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(CheckpointError, match=r"acme/broken: http://127\.0\.0\.1:\d+ answered 500"):
        open_checkpoint("acme/broken")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match=r"acme/tiny: .* http://127\.0\.0\.1:9 cannot be reached"):
        open_checkpoint("acme/tiny")
