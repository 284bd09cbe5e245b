"""The log of a run: one JSON object per step on disk, and a line every few steps on screen."""

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from deberta_dist.planning.dry_run import format_seconds
from deberta_dist.training.trainer import EvaluationResult

METRICS_NAME = "metrics.jsonl"
_LONGEST_LINE = 2**20

# Name of a source -> its epoch, the index in the epoch, and num_samples, the samples of an epoch.
Position = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step.

    Attributes:
        step: Optimizer steps done, this one included.
        loss: Mean over the step's targets (nats); null on disk where it is not finite.
        grad_norm: Global L2 norm before clipping; None when the step was skipped.
        lr: Learning rate of the step.
        tokens_per_second: Of the whole run, padding left out.
        mfu: Model FLOPs utilisation, 0 to 1; None where the device's peak is unknown.
        consumed_samples: Sequences read since the start; with dynamic batching ``data.max_seq_length`` tokens count as
            one, padding included.
        data_seconds: Time that the step waited for its batch on rank 0.
        skipped: True when a gradient was not finite on some rank, so that no rank stepped.
    """

    step: int
    loss: float
    grad_norm: float | None
    lr: float
    tokens_per_second: float
    mfu: float | None
    consumed_samples: int
    data_seconds: float
    skipped: bool = False


@dataclass(frozen=True)
class NetworkMetrics:
    """One optimizer step of a network beside the one whose weights are the run's result; see `StepMetrics`."""

    loss: float
    grad_norm: float | None
    lr: float


class MetricsLog:
    """Writes ``metrics.jsonl`` and prints; on ranks other than 0 it does neither.

    Args:
        directory: The run directory; an existing ``metrics.jsonl`` is appended to.
        is_writer: True on global rank 0.
        max_steps: Length of the run (optimizer steps), for the time left.
        print_every: Steps between lines on screen.
    """

    def __init__(self, directory: Path, *, is_writer: bool, max_steps: int, print_every: int) -> None:
        self._file: BinaryIO | None = None
        self._is_full = False
        if is_writer:
            self._file = (directory / METRICS_NAME).open("a+b", buffering=0)
            _drop_torn_line(self._file)
        self._max_steps = max_steps
        self._print_every = print_every
        self._first_step_ended: float | None = None
        self._done = 0

    def step(self, metrics: StepMetrics, *, networks: Mapping[str, NetworkMetrics] = MappingProxyType({}), **more: Any) -> None:
        """Records one optimizer step.

        Args:
            metrics: Of the step, and of the network whose weights are the run's result.
            networks: Of further networks, by name. In the file their names stand before the keys: ``NAME.loss``.
            more: Further numbers for the file.
        """
        if self._first_step_ended is None:
            self._first_step_ended = time.monotonic()
        else:
            self._done += 1
        self._write({**asdict(metrics), **_prefixed(networks), **more})
        if metrics.skipped:
            moved = " and ".join(name for name, other in networks.items() if other.grad_norm is not None)
            self.say(
                f"step {metrics.step}: skipped on every rank, a gradient was not finite "
                f"(loss {metrics.loss:.4f}); weights unchanged{f', but those of {moved}' if moved else ''}"
            )
        elif metrics.step % self._print_every == 0 or metrics.step in (1, self._max_steps):
            self.say(self._line(metrics, networks, padding=more.get("padding")))

    def left_out(self, *, step: int, consumed_samples: int) -> None:
        """Records a step that was left out: its batch was dropped."""
        self._write({"step": step, "left_out": True, "consumed_samples": consumed_samples})
        self.say(f"step {step}: left out, its batch is dropped; weights unchanged")

    def evaluation(self, *, step: int, networks: Mapping[str, EvaluationResult]) -> None:
        """Records an evaluation on held-out text, of every network by name; names stand before the keys as in `step`."""
        record, shown = {}, []
        for name, found in networks.items():
            values = {"valid_loss": found.loss, "valid_accuracy": found.accuracy, "valid_targets": found.num_targets}
            record |= {f"{name}.{key}" if name else key: value for key, value in values.items()}
            of = f" of {name}" if name else ""
            counted = "masked tokens" if found.counted == "targets" else found.counted
            shown.append(f"loss{of} {found.loss:.4f}, accuracy {found.accuracy:.2%} over {found.num_targets:,} {counted}")
        self._write({"step": step, **record})
        self.say(f"step {step}: held-out {'; '.join(shown)}")

    def scores(self, *, step: int, scores: Mapping[str, float], is_best: bool) -> None:
        """Records the scores of a benchmark's validation split, percent."""
        self._write({"step": step, **{f"valid_{name}": value for name, value in scores.items()}, "is_best": is_best})
        shown = ", ".join(f"{name} {value:.2f}" for name, value in scores.items())
        self.say(f"step {step}: validation {shown}{' (best so far)' if is_best else ''}")

    def checkpoint(
        self,
        *,
        step: int,
        path: Path,
        wait_seconds: float,
        copy_seconds: float,
        write_seconds: float,
        position: Position,
    ) -> None:
        """Records a finished checkpoint.

        Args:
            step: Steps done when it was made.
            path: Its directory.
            wait_seconds: Pause until the checkpoint before was finished; 0 unless the disk is too slow for them.
            copy_seconds: Pause for the copy to host memory.
            write_seconds: From then on, in the background.
            position: Where it stands in each source.
        """
        seconds = {"wait_seconds": wait_seconds, "copy_seconds": copy_seconds, "write_seconds": write_seconds}
        self._write({"step": step, "checkpoint": path.name, **seconds, "position": position})
        pause = wait_seconds + copy_seconds
        self.say(f"step {step}: checkpoint {path} (pause {pause:.2f} s, written in {write_seconds:.2f} s)")

    def starts_over(self) -> None:
        """Records that an earlier start left no checkpoint, so that lines after this one repeat those before it."""
        if self._file is not None and self._file.tell():
            self._write({"resumed_from_step": 0})

    def resumed(
        self,
        *,
        step: int,
        path: Path,
        changed: list[str],
        position: Position,
        learning_rates: tuple[float, float] | None = None,
    ) -> None:
        """Records that the run continues from a checkpoint; later lines may repeat steps of an earlier start.

        Args:
            step: Steps done when the checkpoint was made.
            path: Its directory.
            changed: Settings that differ from the checkpoint's.
            position: Where it stands in each source.
            learning_rates: Of the checkpoint's last step and of the next, where the schedule has changed.
        """
        record = {"resumed_from_step": step, "checkpoint": path.name, "changed": changed, "position": position}
        if learning_rates is not None:
            record |= {"lr_before": learning_rates[0], "lr_after": learning_rates[1]}
        self._write(record)
        self.say(f"continues from {path} (step {step})")
        for name, place in position.items():
            self.say(f"  {name}: epoch {place['epoch']}, sample {place['index']:,} of {place['num_samples']:,}")
        for line in changed:
            self.say(f"  changed since: {line}")
        if learning_rates is not None:
            self.say(describe_learning_rates(step, learning_rates))

    def say(self, text: str) -> None:
        """Prints one line (rank 0 only)."""
        if self._file is not None:
            print(text, flush=True)

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()

    def _write(self, values: dict) -> None:
        if self._file is not None:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
            line = (json.dumps(finite, allow_nan=False) + "\n").encode("utf-8")
            end = self._file.seek(0, os.SEEK_END)
            try:
                written = self._file.write(line)
                is_written = written == len(line)
            except OSError:
                is_written = False
            if not is_written:  # a full disk costs the line, not the run
                self._file.truncate(end)
            if is_written == self._is_full:
                self._is_full = not is_written
                self.say(
                    f"warning: {self._file.name} {'cannot be written, lines are lost' if self._is_full else 'is written again'}"
                )

    def _line(self, metrics: StepMetrics, networks: Mapping[str, NetworkMetrics], *, padding: float | None) -> str:
        # The first step also sets up, so the time left is estimated from the steps after it, evaluations included.
        elapsed = time.monotonic() - self._first_step_ended
        steps_left = self._max_steps - metrics.step
        left = f" | left {format_seconds(elapsed / self._done * steps_left)}" if self._done else ""
        padded = "" if padding is None else f" (and {padding:.1%} padding)"
        mfu = "" if metrics.mfu is None else f" | mfu {metrics.mfu:.1%}"
        numbers = "".join(f"{f'{name}: ' if name else ''}{_shown(one)} | " for name, one in {"": metrics, **networks}.items())
        return (
            f"step {metrics.step:>{len(str(self._max_steps))}}/{self._max_steps} | {numbers}"
            f"{metrics.tokens_per_second:9,.0f} tokens/s{padded}{mfu}{left}"
        )


def _prefixed(networks: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of each network's record behind its name."""
    return {f"{name}.{key}": value for name, one in networks.items() for key, value in asdict(one).items()}


def _shown(metrics: StepMetrics | NetworkMetrics) -> str:
    norm = " skipped" if metrics.grad_norm is None else f"{metrics.grad_norm:8.3f}"
    return f"loss {metrics.loss:7.4f} | lr {metrics.lr:.2e} | grad norm {norm}"


def describe_learning_rates(step: int, rates: tuple[float, float]) -> str:
    """One line on a schedule that changes behind ``step``."""
    return f"  learning rate: {rates[0]:.3e} in step {step}, {rates[1]:.3e} in step {step + 1} by the schedule from here on"


def _drop_torn_line(file: BinaryIO) -> None:
    """Cuts off what a killed run has left of its last line; the next one would be glued to it."""
    size = file.seek(0, os.SEEK_END)
    start = file.seek(max(0, size - _LONGEST_LINE))
    file.truncate(start + file.read().rfind(b"\n") + 1)
    file.seek(0, os.SEEK_END)
