"""Rooms that need no torch are tested without it: their tests import nothing that imports it, nor DeepSpeed nor the extras."""

import subprocess
import sys

import pytest

from tests.test_architecture import ROOT

ROOMS = ("config", "files", "tasks")
ABSENT = ("torch", "deepspeed", "transformers", "onnx", "peft", "pyarrow", "triton")
PROGRAM = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Absent())
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-m", "not slow", *sys.argv[1:]]))
"""


def run_without_torch(*arguments: str, timeout: float) -> subprocess.CompletedProcess[str]:
    """pytest in a process in which nothing of ``ABSENT`` can be imported."""
    words = [sys.executable, "-c", PROGRAM.format(absent=ABSENT), *arguments]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)


def test_rooms_are_collected_without_torch() -> None:
    run = run_without_torch("--collect-only", *(f"tests/{room}" for room in ROOMS), timeout=120)
    assert run.returncode == 0, run.stdout
    for room in ROOMS:
        assert f"tests/{room}/test_" in run.stdout


def test_a_room_with_torch_is_not() -> None:
    run = run_without_torch("--collect-only", "tests/test_stand_ins.py", timeout=120)
    assert run.returncode != 0 and "No module named 'torch'" in run.stdout


@pytest.mark.slow
def test_rooms_pass_without_torch() -> None:
    run = run_without_torch(*(f"tests/{room}" for room in ROOMS), timeout=600)
    assert run.returncode == 0, run.stdout
