"""Where a task's run with one seed is kept: ``RUN/seed-42/TASK/``, complete or absent.

    val.jsonl, test.jsonl   probabilities (``tasks/predictions.py``); MNLI has no test.jsonl
    weights/                best weights: config.json, model.safetensors (float32, published names), spm.model
    metrics.jsonl           one JSON object per step and evaluation
    run_config.toml, deepspeed.json
    run.json                what made it: start, settings, data, scores; written last

The diagnostics of the RTE model lie beside it, ``RUN/seed-42/AX-b/test.jsonl``. While a run goes on it writes to
``.TASK.unfinished``, which the next start throws away.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deberta_dist.errors import ConfigError
from deberta_dist.lock import LOCK_NAME, RunLock
from deberta_dist.tasks.predictions import Probabilities, predictions_file, run_file, write_predictions
from deberta_dist.tasks.registry import TASKS, Task

IDENTITY = "made_from"


class TaskFolder:
    """One task with one seed.

    Args:
        run_directory: Of all tasks and seeds.
        task: The task.
        seed: Of the run.
    """

    def __init__(self, run_directory: Path, task: Task, seed: int) -> None:
        self.task = task
        self.seed_directory = run_directory / f"seed-{seed}"
        self.final = self.seed_directory / task.name
        self.unfinished = self.seed_directory / f".{task.name}.unfinished"
        self._lock: RunLock | None = None

    @property
    def weights(self) -> Path:
        """Where the best weights of a finished run are."""
        return self.final / "weights"

    def is_done(self, identity: Mapping[str, Any]) -> bool:
        """Whether it holds a finished run of just this task.

        Args:
            identity: What the run would be made from.

        Raises:
            ConfigError: it holds another run, or something else; or a diagnostic's folder does, which would be replaced.
        """
        if not os.path.lexists(self.final):
            # A start that was killed in its last moment leaves diagnostics as well, and its own unfinished folder.
            foreign = [path for path in self._diagnostics() if os.path.lexists(path) and not self.unfinished.exists()]
            if foreign:
                raise ConfigError(
                    f"{foreign[0]} is there without {self.final}, whose model answers it: move it away or name another "
                    "run.directory"
                )
            return False
        try:
            there = json.loads(run_file(self.seed_directory, self.task.name).read_text(encoding="utf-8"))[IDENTITY]
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(f"{self.final} is no finished run: move it away or name another run.directory") from None
        for split in ("val", "test") if self.task.name in TASKS else ("val",):
            if not predictions_file(self.seed_directory, self.task, split).is_file():
                raise ConfigError(f"{self.final} has lost its {split}.jsonl: move it away and start again")
        here = json.loads(json.dumps(identity))
        if changed := _differences(there, here):
            shown = "; ".join(changed[:3]) + ("; ..." if len(changed) > 3 else "")
            raise ConfigError(f"{self.final} was made otherwise ({shown}): move it away or name another run.directory")
        return True

    def begin(self) -> None:
        """Takes the folder for this process and clears what an unfinished run left.

        Raises:
            ConfigError: another run works there, or has just finished it; or it cannot be written.
        """
        self._lock = RunLock(self.unfinished)
        if os.path.lexists(self.final):
            shutil.rmtree(self.unfinished)
            raise ConfigError(f"{self.final} has just been finished by another run: start the same command again")
        for path in self.unfinished.iterdir():
            if path.name != LOCK_NAME:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def write_predictions(self, probabilities: Probabilities, split: str) -> None:
        """Writes the predictions for a split."""
        write_predictions(self.unfinished / f"{split}.jsonl", probabilities)

    def finish(self, run: Mapping[str, Any], diagnostics: Mapping[str, tuple[Task, Probabilities]]) -> None:
        """Writes what made it, and gives it and the diagnostics their names.

        Args:
            run: For ``run.json``.
            diagnostics: Predictions of this model for other tasks' test splits, by name.
        """
        for name, (task, probabilities) in diagnostics.items():
            beside = self.seed_directory / f".{name}.unfinished"
            shutil.rmtree(beside, ignore_errors=True)
            write_predictions(beside / "test.jsonl", probabilities)
            # An earlier start may have ended between this and the task's own folder.
            shutil.rmtree(predictions_file(self.seed_directory, task, "test").parent, ignore_errors=True)
            os.rename(beside, self.seed_directory / name)
        text = json.dumps(run, indent=1, ensure_ascii=False, allow_nan=False)
        (self.unfinished / run_file(self.seed_directory, self.task.name).name).write_text(text + "\n", encoding="utf-8")
        assert self._lock is not None
        # Held until the name is given: whoever takes the folder clears it.
        os.rename(self.unfinished, self.final)
        (self.final / LOCK_NAME).unlink()
        self._lock.release()

    def _diagnostics(self) -> list[Path]:
        """Folders of the tasks that this one's model answers."""
        return [self.seed_directory / task.name for task in TASKS.values() if task.answered_by == self.task.name]


def _differences(there: Any, here: Any, name: str = "") -> list[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        keys = sorted({*there, *here})
        return [line for key in keys for line in _differences(there.get(key), here.get(key), f"{name}.{key}".lstrip("."))]
    return [] if there == here else [f"{name} was {there!r}, is {here!r}"]
