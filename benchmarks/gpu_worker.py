"""One step of the GPU measurements, in the process that ``gpu_processes`` starts for it.

    python -m benchmarks.gpu_worker FOLDER PLAN     PLAN is JSON

Imports what the step needs, waits for a line on its input, runs the step, and keeps ``FOLDER/NAME.json`` up to date: what
was found before a hang or a crash is on disk. Imports nothing heavy itself.
"""

import importlib
import importlib.metadata
import json
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

NO_GPU = 3
"""Exit code where torch sees no GPU: no other step can run either."""
RUNNING, DONE, DISAGREES, FAILED = "running", "done", "disagrees", "failed"
PACKAGES = ("torch", "triton", "numpy", "deepspeed", "pydantic", "transformers", "disentangled-flash")


@dataclass(frozen=True)
class StepSetting:
    """Where a step runs.

    Attributes:
        device: Type of torch device, "cuda" or "cpu".
        rehearses: Whether sizes are reduced so that a CPU needs seconds.
    """

    device: str
    rehearses: bool

    def sized(self, real: Any, small: Any) -> Any:
        """The first on a GPU, the second in a rehearsal."""
        return small if self.rehearses else real


class StepReport:
    """Results of a step, printed and saved as soon as they are known.

    Args:
        path: JSON file that is rewritten with every result.
        record: Initial contents of the file, among them the step's name.
        console: Stream that lines are printed to.
    """

    def __init__(self, path: Path, record: Mapping[str, Any], *, console: TextIO) -> None:
        self._path, self._console = path, console
        self.record: dict[str, Any] = {**record, "status": RUNNING, "figures": {}, "checks": [], "notes": []}
        self.save()

    def row(self, name: str, figures: Mapping[str, Any]) -> None:
        """Figures of one contestant or case."""
        self.record["figures"][name] = dict(figures)
        self.save()
        self._say(f"{name}: " + "; ".join(f"{key} {_readable(value)}" for key, value in figures.items()))

    def check(self, name: str, found: float, *, at_most: float, quiet: bool = False) -> None:
        """A number that must not be larger; NaN is. With ``quiet`` nothing is printed if it is not."""
        self._check(name, bool(found <= at_most), quiet, found=found, at_most=at_most)

    def require(self, name: str, is_right: bool, found: str, *, quiet: bool = False) -> None:
        """A fact that must hold, and what was found, in words."""
        self._check(name, is_right, quiet, found=found)

    def note(self, text: str) -> None:
        """What was not done, and why."""
        self.record["notes"].append(text)
        self.save()
        self._say(f"note: {text}")

    def end(self, status: str, error: str | None = None) -> None:
        """The last word; a step that is done and has a wrong check disagrees."""
        is_right = all(check["right"] for check in self.record["checks"])
        self.record |= {"status": DISAGREES if status == DONE and not is_right else status, "error": error}
        self.save()

    def save(self) -> None:
        """Replaces the JSON; a reader never sees half of it."""
        write_json(self._path, self.record)

    def _check(self, name: str, is_right: bool, quiet: bool, **found: Any) -> None:
        self.record["checks"].append({"name": name, "right": is_right, **found})
        self.save()
        if is_right and quiet:
            return
        shown = ", ".join(f"{key.replace('_', ' ')} {_readable(value)}" for key, value in found.items())
        self._say(f"{'right' if is_right else 'WRONG'}: {name}: {shown}")

    def _say(self, text: str) -> None:
        print(f"[{self.record['step']}] {text}", file=self._console, flush=True)


def write_json(path: Path, content: Any) -> None:
    """Writes a file beside and puts it in place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def versions() -> dict[str, str]:
    """Of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _readable(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_readable, value))
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} {_readable(one)}" for key, one in value.items()) + "}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _named(name: str) -> Callable[..., None]:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _end_with_parent() -> None:
    """Whoever kills the parent means the steps as well."""
    sys.stdin.buffer.read()
    os.killpg(0, signal.SIGKILL)


def _device_name(device: str) -> str:
    if device == "cpu":
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        print("torch sees no GPU", file=sys.stderr)
        sys.stderr.flush()
        os._exit(NO_GPU)
    return torch.cuda.get_device_name()


def main(folder: Path, plan: dict[str, Any]) -> None:
    """Runs the step; the record says how it ended."""
    # What libraries print goes to the step's log.
    console = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    function = _named(plan["function"])
    if plan["ahead"] is not None:
        _named(plan["ahead"])()
    if not sys.stdin.buffer.readline():
        return
    threading.Thread(target=_end_with_parent, daemon=True).start()
    record = {
        "step": plan["step"],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": plan["command"],
        "device": _device_name(plan["device"]),
        "versions": versions(),
        "rehearsal": plan["rehearses"],
    }
    report = StepReport(folder / f"{plan['step']}.json", record, console=console)
    setting = StepSetting(device=plan["device"], rehearses=plan["rehearses"])
    begun = time.monotonic()
    try:
        function(setting, report, **plan["options"])
        report.end(DONE)
    except Exception as error:  # recorded, whatever it is
        traceback.print_exc()
        report.end(FAILED, f"{type(error).__name__}: {error}"[:1000])
    print(f"{time.monotonic() - begun:.1f} s", file=sys.stderr)
    sys.stderr.flush()
    # After an error of the device the interpreter's own goodbye may hang.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
