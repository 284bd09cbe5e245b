"""The command lines as a user has them: no module of the package is named here, for modules move and commands stay."""

import contextlib
import hashlib
import io
import json
import math
import os
import runpy
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.harness import free_port, run_ranks

ROOT = Path(__file__).parents[2]
LAUNCHERS = ROOT / "launchers"
FIXTURES = ROOT / "tests" / "fixtures" / "v0.1.0"


def tool(name: str, *words: object, code: int = 0) -> str:
    """Runs ``tools/NAME.py`` in this process, which has torch already, and returns what it printed.

    Args:
        name: Of the tool.
        words: Its command line.
        code: The exit code it has to end with.
    """
    printed, arguments, handler = io.StringIO(), sys.argv, signal.getsignal(signal.SIGTERM)
    sys.argv = [f"{name}.py", *map(str, words)]
    try:
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")
    finally:
        sys.argv = arguments
        signal.signal(signal.SIGTERM, handler)
    assert (ended.value.code or 0) == code, printed.getvalue()
    return printed.getvalue()


def tool_process(name: str, *words: object, cwd: Path) -> str:
    """Runs ``tools/NAME.py`` in a process of its own, for the tools that start workers."""
    command = [sys.executable, ROOT / "tools" / f"{name}.py", *words]
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def launch(launcher: Path, *words: object, processes: int) -> None:
    """Starts a launcher as DeepSpeed does, the same file on every rank, in the launcher's directory."""
    run_ranks(processes, _rank, launcher, list(map(str, words)), free_port(), timeout=120)


def _rank(launcher: Path, words: list[str], port: int) -> None:
    os.environ |= {"MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    os.chdir(launcher.parent)
    sys.argv = [launcher.name, f"--local_rank={os.environ['LOCAL_RANK']}", *words]
    runpy.run_path(launcher.name, run_name="__main__")


def dry_run(launcher: Path, *words: object, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a launcher's ``--dry-run`` prints."""
    monkeypatch.chdir(launcher.parent)
    monkeypatch.setattr(sys, "argv", [launcher.name, *map(str, words), "--dry-run"])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        runpy.run_path(launcher.name, run_name="__main__")
    return printed.getvalue()


def metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def numbers(lines: Iterable[dict[str, Any]], *, after: int) -> list[dict[str, Any]]:
    """Of every step and evaluation behind step ``after``, what does not depend on a clock."""
    keys = ("step", "loss", "grad_norm", "lr", "consumed_samples", "skipped", "epochs", "sift_loss", "accuracy")
    keys += ("valid_loss", "valid_accuracy", "valid_targets", "is_best")
    kept = [{key: line[key] for key in keys if key in line} for line in lines if line.get("step", 0) > after]
    return [line for line in kept if line.keys() & {"loss", "valid_loss", "valid_accuracy"}]


def weights(directory: Path) -> dict[str, np.ndarray]:
    """The tensors of ``DIRECTORY/model.safetensors``."""
    return load_file(directory / "model.safetensors")


def computes_as_recorded() -> bool:
    """Whether this machine computes as the one that made the fixtures: same torch, same bits in its operations.

    Where it does not (other matrix products, another torch), numbers are compared to rounding, and a warning says so.
    """
    here = runpy.run_path(str(FIXTURES / "probe.py"))["probe"]()
    recorded = json.loads((FIXTURES / "made" / "recorded_probe.json").read_text(encoding="utf-8"))
    if here != recorded:
        warnings.warn(f"recorded numbers are compared to rounding: {recorded} there, {here} here", stacklevel=2)
    return bool(here == recorded)


def same_numbers(found: Any, expected: Any, *, relative: float, where: str = "") -> None:
    """Compares JSON: floats to ``relative`` (0: equal), everything else equal.

    Raises:
        AssertionError: names the place that differs.
    """
    if isinstance(expected, dict):
        assert isinstance(found, dict) and found.keys() == expected.keys(), where
        for key, value in expected.items():
            same_numbers(found[key], value, relative=relative, where=f"{where}.{key}")
    elif isinstance(expected, list):
        assert isinstance(found, list) and len(found) == len(expected), where
        for number, value in enumerate(expected):
            same_numbers(found[number], value, relative=relative, where=f"{where}[{number}]")
    elif isinstance(expected, float) and relative:
        assert isinstance(found, float) and math.isclose(found, expected, rel_tol=relative, abs_tol=1e-12), (
            where,
            found,
            expected,
        )
    else:
        assert found == expected, (where, found, expected)


def same_tensors(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], *, relative: float) -> None:
    """Compares tensors by name: bit by bit, or by the norm of the difference where ``relative`` is not 0.

    Raises:
        AssertionError: names the tensor that differs.
    """
    assert found.keys() == expected.keys() and expected
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        if relative:
            assert np.linalg.norm(found[name] - tensor) <= relative * max(np.linalg.norm(tensor), 1e-6), name
        else:
            assert np.array_equal(found[name], tensor), name


def recorded(made: Path, name: str) -> Any:
    """What the fixtures' ``recorded_NAME.json`` holds."""
    return json.loads((made / f"recorded_{name}.json").read_text(encoding="utf-8"))


def same_as_recorded(found: dict[str, np.ndarray], expected: dict[str, tuple[str, float]], *, relative: float) -> None:
    """Compares tensors with their recorded hashes; with their norms, in float64, where ``relative`` is not 0.

    Raises:
        AssertionError: names the tensor that differs.
    """
    assert found.keys() == expected.keys() and expected
    for name, (digest, norm) in expected.items():
        if relative:
            assert math.isclose(np.linalg.norm(found[name].astype("float64")), norm, rel_tol=relative, abs_tol=1e-12), name
        else:
            assert hashlib.sha256(found[name].tobytes()).hexdigest()[:16] == digest, name
