"""What runs together when tests are spread over several processes, and what if one of these ends."""

import os
import subprocess
import sys
from pathlib import Path

from tests.spread import MATRIX, PROCESSES, scope

ROOT = Path(__file__).parents[1]
SPREAD = """
from tests.spread import ByScope

def pytest_xdist_make_scheduler(config, log):
    return ByScope(config, log)
"""
ENDED = "import os\n\ndef test_that_ends_its_process():\n    os._exit(3)\n"


def test_tests_of_a_file_run_together_and_those_of_real_servers_in_one_process():
    assert scope("tests/engine/test_radix.py::test_a[1-2]") == "tests/engine/test_radix.py"
    assert scope("tests/e2e/test_demo.py::test_a") == scope("tests/multihost/test_meeting.py::test_b[x]")


def test_matrix_of_layouts_is_spread_by_family():
    assert scope(f"{MATRIX}::test_a[mixtral-tp4-ep2-ragged]") == scope(f"{MATRIX}::test_b[mixtral-tp2]")
    assert scope(f"{MATRIX}::test_a[mixtral-tp2]") != scope(f"{MATRIX}::test_a[qwen2_moe-tp2]")
    assert scope(f"{MATRIX}::test_a") == MATRIX


def test_files_that_are_named_are_there():
    assert [path for path in (*PROCESSES, MATRIX) if not (ROOT / path).exists()] == []


def test_test_that_ends_its_process_fails_alone_and_all_others_run(tmp_path):
    """Also the last one of a file, behind which the process would wait for another."""
    (tmp_path / "conftest.py").write_text(SPREAD)
    (tmp_path / "test_a.py").write_text(f"def test_1(): pass\n{ENDED}\ndef test_2(): pass\n")
    (tmp_path / "test_b.py").write_text(f"def test_1(): pass\ndef test_2(): pass\n{ENDED}")
    (tmp_path / "test_c.py").write_text("def test_1(): pass\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "2",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        tmp_path,
        ".",
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "2 failed, 5 passed" in done.stdout, done.stdout + done.stderr
    failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert sorted(failed) == [f"test_{x}.py::test_that_ends_its_process" for x in "ab"]
