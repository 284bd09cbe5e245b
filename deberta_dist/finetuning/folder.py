"""The folder of a task's run with one seed, ``RUN/seed-42/TASK/``: complete or absent.

    val.jsonl, test.jsonl   probabilities (``tasks/predictions.py``); of the splits that the task has
    weights/                best weights: config.json, model.safetensors (float32, published names), spm.model
    state/                  last weights and their moments, from which a run of more epochs continues
    metrics.jsonl           one JSON object per step and evaluation
    run_config.toml, deepspeed.json
    run.json                what made it: start, settings, data, scores; written last

The diagnostics that its model answers lie beside it, ``RUN/seed-42/DIAGNOSTIC/test.jsonl``. While a run goes on it writes to
``.TASK.unfinished``, which the next start throws away. A run that continued a shorter one leaves that as ``TASK.epochs-2/``,
its diagnostics in it and its state gone.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deberta_dist.errors import ConfigError
from deberta_dist.files.atomic import replace_directory
from deberta_dist.files.lock import LOCK_NAME, RunLock
from deberta_dist.tasks.base import TRAIN, Task
from deberta_dist.tasks.decisions import Probabilities
from deberta_dist.tasks.predictions import predictions_file, run_file, write_predictions

IDENTITY = "made_from"
EARLIER = "earlier"
STATE_NAME = "state"


class TaskFolder:
    """One task with one seed.

    Args:
        run_directory: Of all tasks and seeds.
        seed: Names the folder above the task's: one run for each seed.
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

        Returns:
            False also where the run would be longer than the one that is there, and otherwise the same.

        Raises:
            ConfigError: it holds another run, or something else; or a diagnostic's folder does, which would be replaced.
        """
        if not os.path.lexists(self.final):
            if aside := next((path for path in self.seed_directory.glob(f"{self.task.name}.epochs-*/{STATE_NAME}")), None):
                raise ConfigError(
                    f"{aside.parent} is there without {self.final}: a start ended while it was about to be replaced; rename it to "
                    f"{self.final} and start again"
                )
            # A start that was killed in its last moment leaves diagnostics as well, and its own unfinished folder.
            foreign = [path for path in self._diagnostics() if os.path.lexists(path) and not self.unfinished.exists()]
            if foreign:
                raise ConfigError(
                    f"{foreign[0]} is there without {self.final}, whose model answers it: move it away or name another "
                    "run.directory"
                )
            return False
        there = self._read_run()[IDENTITY]
        for split in (split for split in self.task.splits if split != TRAIN):
            if not predictions_file(self.seed_directory, self.task, split).is_file():
                raise ConfigError(f"{self.final} has lost its {split}.jsonl: move it away and start again")
        here = json.loads(json.dumps(identity))
        changed = _differences(there, here)
        if changed and _is_longer(there, here):
            return False
        if changed:
            shown = "; ".join(changed[:3]) + ("; ..." if len(changed) > 3 else "")
            more = "more epochs than it had would continue it; " if _is_longer(here, there) else ""
            raise ConfigError(
                f"{self.final} was made with other settings ({shown}): {more}move it away or name another run.directory"
            )
        return True

    def shorter_run(self, identity: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """``run.json`` of a finished run of fewer epochs and otherwise just this one; None where there is none."""
        if not os.path.lexists(self.final):
            return None
        run = self._read_run()
        return run if _is_longer(run[IDENTITY], json.loads(json.dumps(identity))) else None

    def _read_run(self) -> Mapping[str, Any]:
        try:
            run = json.loads(run_file(self.seed_directory, self.task.name).read_text(encoding="utf-8"))
            run[IDENTITY]
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(f"{self.final} is not a finished run: move it away or name another run.directory") from None
        return run

    def begin(self, *, earlier: Mapping[str, Any] | None = None) -> None:
        """Takes the folder for this process and clears what an unfinished run left.

        Args:
            earlier: ``run.json`` of the run that this one continues.

        Raises:
            ConfigError: another run works there, or has just finished it; or it cannot be written.
        """
        self._lock = RunLock(self.unfinished)
        if os.path.lexists(self.final) and (earlier is None or self._read_run() != earlier):
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
            if self.final.exists() and (self.seed_directory / name).exists():  # the answers of the run that this one continues
                shutil.copytree(self.seed_directory / name, self.final / name, dirs_exist_ok=True)
            # An earlier start may have ended between this and the task's own folder.
            final = predictions_file(self.seed_directory, task, "test").parent
            replace_directory(beside, final, aside=beside.with_name(f".{name}.old"))
        text = json.dumps(run, indent=1, ensure_ascii=False, allow_nan=False)
        (self.unfinished / run_file(self.seed_directory, self.task.name).name).write_text(text + "\n", encoding="utf-8")
        assert self._lock is not None
        aside = None
        if self.final.exists():
            epochs = self._read_run()[IDENTITY]["settings"]["training"]["epochs"]
            aside = self.seed_directory / f"{self.task.name}.epochs-{epochs:.12g}"
            os.rename(self.final, aside)
        # Held until the name is given: whoever takes the folder clears it.
        os.rename(self.unfinished, self.final)
        if aside is not None:
            shutil.rmtree(aside / STATE_NAME)
        (self.final / LOCK_NAME).unlink()
        self._lock.release()

    def _diagnostics(self) -> list[Path]:
        """Folders of the tasks that this one's model answers."""
        return [self.seed_directory / task.name for task in self.task.diagnostics]


def _is_longer(there: Any, here: Any) -> bool:
    """Whether ``here`` has more epochs than ``there`` and nothing else differs."""
    try:
        before, after = (identity["settings"]["training"]["epochs"] for identity in (there, here))
        changed = _differences(there, here)
        return len(changed) == 1 and changed[0].startswith("settings.training.epochs ") and before < after
    except (KeyError, TypeError):
        return False


def _differences(there: Any, here: Any, name: str = "") -> list[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        keys = sorted({*there, *here})
        return [line for key in keys for line in _differences(there.get(key), here.get(key), f"{name}.{key}".lstrip("."))]
    return [] if there == here else [f"{name} was {there!r}, is {here!r}"]
