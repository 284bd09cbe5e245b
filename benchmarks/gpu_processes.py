"""Runs the steps of the GPU measurements, each in a process of its own with a time limit of its own.

A step that hangs is killed, one that crashes is reported, and the others continue. While a step runs, the next one's process
imports what it needs: a GPU's minutes are not spent on that.
"""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.gpu_worker import FAILED, NO_GPU, RUNNING, write_json
from deberta_dist.errors import ConfigError

KILLED, CRASHED, NOT_RUN = "killed", "crashed", "not run"
_POLL_SECONDS = 0.05
_LAST_WORDS = 1500


@dataclass(frozen=True)
class GpuStep:
    """One measurement.

    Attributes:
        name: Value of ``--step``, and stem of its files.
        function: ``module:function``, called with a ``StepSetting``, a ``StepReport`` and ``options``.
        limit: Seconds until it is killed.
        proves: One line for ``--list``: what follows if it succeeds.
        options: Keyword arguments of ``function``.
        alone: Whether it is timed, and so has the device to itself.
        needs: Import names of the packages that it cannot run without.
        is_optional: Whether it may be left out if they are missing, without failing the whole.
        ahead: ``module:function``, called before the step may start: for imports that the module itself leaves out.
    """

    name: str
    function: str
    limit: float
    proves: str
    options: Mapping[str, Any] = field(default_factory=dict)
    alone: bool = False
    needs: tuple[str, ...] = ()
    is_optional: bool = False
    ahead: str | None = None


@dataclass(frozen=True)
class StepEnvironment:
    """Where steps run and write their results.

    Attributes:
        folder: Directory of ``NAME.json`` and ``NAME.log``.
        command: The whole command line, recorded with the results.
        rehearses: Whether steps run on the CPU with smaller sizes.
        packages: Directory of packages that take precedence over those installed, or None.
        at_once: Number of steps that may run at the same time if none of them is timed.
    """

    folder: Path
    command: Sequence[str]
    rehearses: bool = False
    packages: Path | None = None
    at_once: int = 1

    def environment(self) -> dict[str, str]:
        """Environment variables of a step's process."""
        paths = [self.packages, ROOT, os.environ.get("PYTHONPATH")]
        found = os.environ | {"PYTHONPATH": os.pathsep.join(str(path) for path in paths if path)}
        if self.rehearses:
            # As in the tests: no GPU, and the fused kernels interpreted.
            found |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        return found


def run_steps(
    steps: Sequence[GpuStep], *, place: StepEnvironment, limit: float, on_end: Callable[[dict[str, Any]], None]
) -> list[dict[str, Any]]:
    """Runs the steps in order; returns their records, one each, in the order in which they ended.

    Args:
        steps: The most important first.
        place: Environment and directory of every step.
        limit: Seconds for all of them; steps that have not run by then are recorded as not run.
        on_end: Called with each record.

    Raises:
        ConfigError: torch sees no GPU.
    """
    records: list[dict[str, Any]] = []
    deadline = time.monotonic() + limit
    waiting, running = list(steps), []
    ready: _Process | None = None

    def end(record: dict[str, Any]) -> None:
        records.append(record)
        write_json(place.folder / f"{record['step']}.json", record)
        on_end(record)

    try:
        while waiting or running:
            if waiting and _may_start(waiting[0], [process.step for process in running], at_once=place.at_once):
                step = waiting.pop(0)
                left = deadline - time.monotonic()
                missing = [name for name in step.needs if not _is_installed(name, place)]
                if missing or left <= 0:
                    reason = f"needs {', '.join(missing)}" if missing else f"the {limit:g} s of all steps were over"
                    if ready is not None:
                        ready.kill()
                        ready = None
                    end({"step": step.name, "status": NOT_RUN, "error": reason, "optional": step.is_optional and left > 0})
                    continue
                process = ready if ready is not None and ready.step is step else _Process(step, place)
                ready = None
                process.go(limit=min(step.limit, left))
                running.append(process)
                continue
            if waiting and ready is None and not any(not _is_installed(name, place) for name in waiting[0].needs):
                ready = _Process(waiting[0], place)
            for process in [process for process in running if process.has_ended()]:
                running.remove(process)
                end(process.record())
            time.sleep(_POLL_SECONDS)
    finally:
        for process in [*running, *([ready] if ready is not None else [])]:
            process.kill()
    return records


def _may_start(step: GpuStep, running: Sequence[GpuStep], *, at_once: int) -> bool:
    if not running:
        return True
    return not step.alone and not any(other.alone for other in running) and len(running) < at_once


def _is_installed(name: str, place: StepEnvironment) -> bool:
    found = place.packages is not None and (place.packages / name).is_dir()
    return found or importlib.util.find_spec(name) is not None


class _Process:
    """A step's process: started, then released."""

    def __init__(self, step: GpuStep, place: StepEnvironment) -> None:
        self.step, self._folder = step, place.folder
        self._limit = step.limit
        self._killed_after: float | None = None
        plan = {
            "step": step.name,
            "function": step.function,
            "options": dict(step.options),
            "ahead": step.ahead,
            "device": "cpu" if place.rehearses else "cuda",
            "rehearses": place.rehearses,
            "command": list(place.command),
        }
        (self._folder / f"{step.name}.json").unlink(missing_ok=True)
        with open(self._folder / f"{step.name}.log", "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu_worker", str(self._folder), json.dumps(plan)],
                cwd=ROOT,
                env=place.environment(),
                stdin=subprocess.PIPE,
                bufsize=0,  # nothing is left to be written to a process that has died
                stderr=log,
                process_group=0,
            )

    def go(self, *, limit: float) -> None:
        self._begun, self._limit = time.monotonic(), limit
        with contextlib.suppress(BrokenPipeError):  # it died while importing; the exit code says so
            self._process.stdin.write(b"go\n")

    def has_ended(self) -> bool:
        """Whether it has, or is over its limit and has been made to."""
        if self._process.poll() is None and time.monotonic() - self._begun > self._limit:
            self._killed_after = self._limit
            self.kill()
        return self._process.poll() is not None

    def kill(self) -> None:
        """With all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdin.close()

    def record(self) -> dict[str, Any]:
        """What the step has saved, and how it ended."""
        seconds, code = time.monotonic() - self._begun, self._process.returncode
        self.kill()  # what it has left behind
        if code == NO_GPU:
            raise ConfigError("torch sees no GPU here: --rehearse runs every step on a CPU, with sizes cut")
        path = self._folder / f"{self.step.name}.json"
        record = {"step": self.step.name, "status": RUNNING}
        if path.exists():
            record = json.loads(path.read_text(encoding="utf-8"))
        if self._killed_after is not None:
            record |= {"status": KILLED, "error": f"not finished after {self._killed_after:.0f} s"}
        elif record["status"] == RUNNING:
            record |= {"status": CRASHED, "error": f"signal {-code}" if code < 0 else f"exit code {code}"}
        if record["status"] in (KILLED, CRASHED, FAILED):
            record["end_of_log"] = self._last_words()
        return {**record, "seconds": round(seconds, 1), "limit": self._limit}

    def _last_words(self) -> str:
        text = (self._folder / f"{self.step.name}.log").read_text(encoding="utf-8", errors="replace")
        return text[-_LAST_WORDS:].strip()
