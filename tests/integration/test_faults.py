"""What happens to a real run: a killed process, a full disk, a second run on the same directory."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.harness import ForkedPython, run_script
from tests.integration.test_launch_and_refuse import DEMO, ONE_RANK, environment, overrides

STEPS = 12
ON_SMALL_DISK = Path(__file__).with_name("on_small_disk.py")
# The save of step 6 has waited until that of step 4 was on disk.
STOPPED_AT = 7
STOPS_ITSELF = f"""
import os, runpy, signal, sys
from deberta_dist.training.metrics import MetricsLog

log_step = MetricsLog.step

def log_and_stop(self, metrics, **more):
    log_step(self, metrics, **more)
    if metrics.step == {STOPPED_AT}:
        os.kill(os.getpid(), signal.SIGSTOP)

MetricsLog.step = log_and_stop
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def arguments(corpus: Path, run: Path, **changes: object) -> list[str]:
    """Twelve steps on one rank, a checkpoint after every second."""
    settings = {"training__max_steps": STEPS, "checkpoint__every_steps": 2, "evaluation__every_steps": 0}
    return [DEMO, *ONE_RANK, *overrides(corpus, run, **settings | changes)]


def start(words: list[object]) -> subprocess.CompletedProcess[str]:
    return run_script(words, env=environment(), cwd="/", timeout=240)


def records(run: Path) -> list[dict]:
    """What the run has logged, a line that is just being written left out."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def is_stopped(process: ForkedPython) -> bool:
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def begin_and_stop(words: list[str], folder: Path) -> ForkedPython:
    """Starts a run and returns when it stands still in the middle."""
    script = folder / "stops_itself.py"
    script.write_text(STOPS_ITSELF)
    output = folder / "output"
    with output.open("wb") as stream:
        process = ForkedPython([sys.executable, script, *words], env=environment(), cwd="/", stdout=stream, stderr=stream)
    deadline = time.monotonic() + 120
    while not is_stopped(process):
        assert process.poll() is None and time.monotonic() < deadline, output.read_text()
        time.sleep(0.01)
    return process


def needs_mounts() -> None:
    """Skips where an ordinary user may not have a file system of his own."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-Urm", "true"], check=False).returncode:
        pytest.skip("file systems cannot be mounted here")


def test_a_killed_run_ends_as_if_it_had_not_been(corpus: Path, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert start(arguments(corpus, whole)).returncode == 0
    process = begin_and_stop(arguments(corpus, run), tmp_path)
    assert sum("copy_seconds" in record for record in records(run)) >= 2
    second = start(arguments(corpus, run))
    assert second.returncode == 2 and 'in use by another run ({"host": ' in second.stderr
    process.kill()
    assert process.wait(30) == -signal.SIGKILL
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
    words = arguments(corpus, run, checkpoint__keep_last=99)
    done = start([ON_SMALL_DISK, run / "checkpoints", "8m", *words])
    assert done.returncode == 0, done.stdout + done.stderr
    saved = [record["step"] for record in records(run) if "copy_seconds" in record]
    assert 1 < len(saved) < 6 and saved == [2 * (i + 1) for i in range(len(saved))]
    assert done.stdout.count("No space left on device") == done.stdout.count("older checkpoints are intact") == 6 - len(saved)
    assert [record["step"] for record in records(run) if "loss" in record] == list(range(1, 13))
    _, _, left = done.stdout.partition("start 1: 0, leaves: ")
    assert left.split() == ["latest", *(f"step-{step:08d}" for step in saved)], "half a checkpoint lies about"
    assert (run / "result.json").exists() and (run / "weights" / "model.safetensors").exists()


def test_a_run_on_a_full_disk_is_finished_when_there_is_room(corpus: Path, tmp_path: Path) -> None:
    """The whole run directory is on the full file system: two checkpoints fit, and the weights do not."""
    needs_mounts()
    run = tmp_path / "run"
    run.mkdir()
    done = start([ON_SMALL_DISK, run, "4700k,64m", *arguments(corpus, run, checkpoint__keep_last=99)])
    first, _, second = done.stdout.partition("start 1: 74, leaves: ")
    assert second, done.stdout + done.stderr
    assert "older checkpoints are intact" in first and "step 12/12" in first
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "weights is not written" in message and "make room and run the same command again" in message
    listed, _, second = second.partition("continues from")
    assert "step-00000002" in listed and "latest" in listed and ".tmp" not in listed
    _, _, left = second.partition("start 2: 0, leaves: ")
    assert "result.json" in left and ".tmp" not in left
