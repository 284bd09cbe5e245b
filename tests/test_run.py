"""The tests' own command: what it starts, and whose failure is its exit code."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
Start = Callable[..., subprocess.CompletedProcess[str]]
BARE = ["-m pytest -n 2 --dist worksteal", "-m ruff check --quiet .", "-m ruff format --check --quiet .", "-m mypy"]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Runs the command with an interpreter that writes down what it is given, and fails where a word of it is ``FAILS``."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/started\ncase " $* " in *" $FAILS "*) exit 3 ;; esac\n')
    python.chmod(0o755)

    def run(*words: str, fails: str = "nothing") -> subprocess.CompletedProcess[str]:
        env = {"PATH": "/usr/bin:/bin", "TEST_PYTHON": str(python), "FAILS": fails}
        return subprocess.run(
            ["sh", ROOT / "tests/run.sh", *words], env=env, capture_output=True, text=True, timeout=30, check=False
        )

    return run


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], BARE),
        (["--lint"], BARE[1:]),
        (["tests/config", "-k", "batch"], ["-m pytest tests/config -k batch"]),
        (["--workers", "4", "-m", "slow"], ["-m pytest -n 4 --dist worksteal -m slow"]),
    ],
)
def test_what_is_started(words: list[str], expected: list[str], start: Start, tmp_path: Path) -> None:
    assert start(*words).returncode == 0
    assert sorted((tmp_path / "started").read_text().splitlines()) == sorted(expected)


@pytest.mark.parametrize(("fails", "code"), [("pytest", 3), ("mypy", 1), ("format", 1)])
def test_everything_runs_and_any_failure_is_the_exit_code(fails: str, code: int, start: Start, tmp_path: Path) -> None:
    result = start(fails=fails)
    assert result.returncode == code and len((tmp_path / "started").read_text().splitlines()) == len(BARE)
    assert "run.sh: mypy" in result.stdout


def test_slow_tests_come_with_marks_alone(pytestconfig: pytest.Config) -> None:
    options = pytestconfig.getini("addopts")
    assert options[options.index("-m") + 1] == "not slow", "PATH and -k alone would bring the slow tests in"
