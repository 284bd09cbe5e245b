"""A stand-in for the ``deepspeed`` command that shows how it was called."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHOW = """#!{python}
import json, os, sys
names = ("DS_ACCELERATOR", "OMP_NUM_THREADS", "PYTHONPATH")
print(json.dumps({{"argv": sys.argv[1:], "env": {{name: os.environ.get(name) for name in names}}}}))
"""

Start = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Runs a command line with the stand-in first on PATH and without GPUs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    fake = folder / "deepspeed"
    fake.write_text(SHOW.format(python=sys.executable))
    fake.chmod(0o755)
    # start.sh takes the interpreter beside deepspeed; a link would lose the virtual environment
    interpreter = folder / "python"
    interpreter.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    interpreter.chmod(0o755)

    def run(*words: str, cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "PYTHONPATH")}
        given = kept | {"PATH": f"{folder}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"} | dict(env or {})
        return subprocess.run(words, cwd=cwd, env=given, capture_output=True, text=True, timeout=60, check=False)

    return run


@pytest.fixture
def called() -> Callable[[subprocess.CompletedProcess[str]], dict]:
    """What the stand-in was called with."""

    def read(result: subprocess.CompletedProcess[str]) -> dict:
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    return read
