"""What the launcher says and does before there is an engine, and when it is told to stop."""

import asyncio
import os
import signal
import tempfile
from pathlib import Path

import pytest
import zmq

from jaxserve import launch
from jaxserve.config import ConfigError, ServerConfig
from jaxserve.launch import Stop, _socket_directory, run


@pytest.mark.parametrize("host", ["no-such-host.invalid", "x" * 70])
def test_host_that_nobody_knows_is_named(host):
    config = ServerConfig(model_path="m", host=host, port=0)
    with pytest.raises(ConfigError) as error:
        asyncio.run(run(config))
    message = f"cannot listen on host={host}, port=0: "
    assert str(error.value).startswith(message) and "Unknown error" not in str(error.value)
    assert len(str(error.value)) > len(message)


# ---- sockets ----


@pytest.fixture
def long_tmpdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / ("x" * zmq.IPC_PATH_MAX_LEN)
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    return directory


def test_sockets_are_in_the_directory_for_temporary_files(monkeypatch):
    with tempfile.TemporaryDirectory() as short:  # pytest's own are too long where its processes have numbers
        monkeypatch.setattr(tempfile, "tempdir", short)
        with _socket_directory() as directory:
            assert directory.startswith(f"{short}/jaxserve-")


def test_sockets_of_a_directory_that_is_too_long_for_them_are_elsewhere(long_tmpdir):
    with _socket_directory() as directory, zmq.Context() as context, context.socket(zmq.PAIR) as socket:
        socket.bind(f"ipc://{directory}/1023")
        assert not list(long_tmpdir.iterdir())


def test_no_place_for_sockets_names_the_variable(long_tmpdir, monkeypatch):
    monkeypatch.setattr(launch, "SHORT_TMPDIR", str(long_tmpdir / "none"))
    with pytest.raises(ConfigError, match=r"no place for sockets: .*; set TMPDIR to a directory of \d+"):
        _socket_directory()


# ---- signals ----


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_cancels_what_the_first_did_not_end(monkeypatch, second):
    steps = []

    async def lead(config: ServerConfig, stop: Stop) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        await stop.wait()
        steps.append("told")
        try:
            os.kill(os.getpid(), second)
            await asyncio.Event().wait()
        finally:
            os.kill(os.getpid(), second)  # a third changes nothing
            await asyncio.sleep(0.01)
            steps.append("engines killed")
        return 0

    monkeypatch.setattr(launch, "lead", lead)
    assert asyncio.run(run(ServerConfig(model_path="m"))) == 128 + second
    assert steps == ["told", "engines killed"]


def test_cancelled_without_a_signal_it_is_cancelled(monkeypatch):
    async def lead(config: ServerConfig, stop: Stop) -> int:
        raise asyncio.CancelledError

    monkeypatch.setattr(launch, "lead", lead)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(run(ServerConfig(model_path="m")))
