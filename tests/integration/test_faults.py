"""What happens to a real run: a killed process, a full disk, a second run on the same directory."""

import json
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.integration.test_launch_and_refuse import DEMO, ONE_RANK, environment, overrides, start

pytestmark = pytest.mark.serial

STEPS = 30


def arguments(corpus: Path, run: Path, **changes: object) -> list[str]:
    """Thirty steps on one rank, a checkpoint after every second."""
    settings = {"training__max_steps": STEPS, "checkpoint__every_steps": 2, "evaluation__every_steps": 0}
    return [sys.executable, DEMO, *ONE_RANK, *overrides(corpus, run, **settings | changes)]


def records(run: Path) -> list[dict]:
    """What the run has logged, a line that is just being written left out."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def begin(words: list[str], *, run: Path) -> subprocess.Popen[str]:
    """Starts a run and returns when it has saved twice."""
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(), cwd="/")
    deadline = time.monotonic() + 120
    while sum("copy_seconds" in record for record in records(run)) < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=5)[0]
        time.sleep(0.01)
    return process


def needs_mounts() -> None:
    """Skips where an ordinary user may not have a file system of his own."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-Urm", "true"], check=False).returncode:
        pytest.skip("file systems cannot be mounted here")


def test_a_killed_run_ends_as_if_it_had_not_been(corpus: Path, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert start(arguments(corpus, whole)).returncode == 0
    process = begin(arguments(corpus, run), run=run)
    process.send_signal(signal.SIGSTOP)  # small steps: it would be done before the second one is refused
    second = start(arguments(corpus, run))
    assert second.returncode == 2 and 'in use by another run ({"host": ' in second.stderr
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert not (run / "result.json").exists()
    finished = start(arguments(corpus, run))
    assert finished.returncode == 0 and "continues from" in finished.stdout
    expected, found = (load_file(directory / "weights" / "model.safetensors") for directory in (whole, run))
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    losses = [{r["step"]: r["loss"] for r in records(directory) if "loss" in r} for directory in (whole, run)]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS


def test_a_full_disk_costs_checkpoints_and_not_the_run(corpus: Path, tmp_path: Path) -> None:
    """Checkpoints of 2 MB on a file system of 8 MiB of its own, where none is ever removed."""
    needs_mounts()
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    after = 'ls "$1"; exit $code'
    script = f'mount -t tmpfs -o size=8m none "$1" && shift && "$@"; code=$?; set -- "{run}/checkpoints"; {after}'
    words = arguments(corpus, run, checkpoint__keep_last=99, training__max_steps=12)
    done = start(["unshare", "-Urm", "sh", "-c", script, "sh", str(run / "checkpoints"), *words])
    assert done.returncode == 0, done.stdout + done.stderr
    saved = [record["step"] for record in records(run) if "copy_seconds" in record]
    assert 1 < len(saved) < 6 and saved == [2 * (i + 1) for i in range(len(saved))]
    assert done.stdout.count("No space left on device") == done.stdout.count("older checkpoints are intact") == 6 - len(saved)
    assert [record["step"] for record in records(run) if "loss" in record] == list(range(1, 13))
    left = done.stdout.splitlines()[-1 - len(saved) :]
    assert left == ["latest", *(f"step-{step:08d}" for step in saved)], "half a checkpoint lies about"
    assert (run / "result.json").exists() and (run / "weights" / "model.safetensors").exists()


def test_a_run_on_a_full_disk_is_finished_when_there_is_room(corpus: Path, tmp_path: Path) -> None:
    """The whole run directory is on the full file system: two checkpoints fit, and the weights do not."""
    needs_mounts()
    run = tmp_path / "run"
    run.mkdir()
    script = textwrap.dedent(
        """
        run=$1; shift
        mount -t tmpfs -o size=4700k none "$run"
        "$@"; echo "first start: $?"
        ls -A "$run" "$run/checkpoints"
        mount -o remount,size=64m "$run"
        "$@"; echo "second start: $?"
        ls -A "$run"
        """
    )
    words = arguments(corpus, run, checkpoint__keep_last=99, training__max_steps=12)
    done = start(["unshare", "-Urm", "sh", "-c", script, "sh", str(run), *words])
    first, _, second = done.stdout.partition("first start: 74")
    assert second, done.stdout + done.stderr
    assert "older checkpoints are intact" in first and "step 12/12" in first
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "weights is not written" in message and "make room and run the same command again" in message
    listed, _, second = second.partition("continues from")
    assert "step-00000002" in listed and "latest" in listed and ".tmp" not in listed
    assert "second start: 0" in second and "result.json" in second and ".tmp" not in second
