"""What runs together when tests are spread over several processes."""

from tests.models.tiny import GOLDEN
from tests.spread import MATRIX, PROCESSES, scope


def test_tests_of_a_file_run_together_and_those_of_real_servers_in_one_process():
    assert scope("tests/engine/test_radix.py::test_a[1-2]") == "tests/engine/test_radix.py"
    assert scope("tests/e2e/test_demo.py::test_a") == scope("tests/multihost/test_meeting.py::test_b[x]")


def test_matrix_of_layouts_is_spread_by_family():
    assert scope(f"{MATRIX}::test_a[mixtral-tp4-ep2-ragged]") == scope(f"{MATRIX}::test_b[mixtral-tp2]")
    assert scope(f"{MATRIX}::test_a[mixtral-tp2]") != scope(f"{MATRIX}::test_a[qwen2_moe-tp2]")
    assert scope(f"{MATRIX}::test_a") == MATRIX


def test_files_that_are_named_are_there():
    root = GOLDEN.parent.parent
    assert [path for path in (*PROCESSES, MATRIX) if not (root / path).exists()] == []
