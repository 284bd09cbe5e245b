"""The working directory of a preparation, ``OUTPUT/.work``: what is finished stays there until all is.

::

    recipe.json          the recipe; another one is refused
    parts/               encoded pieces of the inputs, named by the file's path, size and time of change
    STATE/duplicates/    documents to drop, per range of hashes; STATE names the recipe and all pieces
    STATE/output/        token files, then indexes and report: what moves to OUTPUT at the end
    run-*/               claims and progress of one start
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

from deberta_dist.corpus.publish import publish
from deberta_dist.corpus.recipe import Recipe, Unit
from deberta_dist.errors import ConfigError, DataError

WORK_NAME = ".work"
REPORT_NAME = "report.json"
_RECIPE_NAME = "recipe.json"


class Workspace:
    """Paths of one preparation.

    Args:
        output: directory that the corpus is made in.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.directory = output / WORK_NAME
        self.parts = self.directory / "parts"

    def state(self, recipe: Recipe, units: Sequence[Unit]) -> Path:
        """Where the results live that depend on all units."""
        identity = json.dumps([recipe.as_json(), [unit.name for unit in units], [unit.file.source for unit in units]])
        return self.directory / hashlib.sha256(identity.encode("utf-8")).hexdigest()[:20]

    def refuse_foreign(self) -> None:
        """Refuses an output that is no unfinished preparation.

        Raises:
            DataError: it is complete, or holds something else.
        """
        if (self.output / REPORT_NAME).exists():
            raise DataError(f"{self.output} is a complete corpus and is left as it is: name another output, or move it away")
        if not self.output.exists():
            return
        if not self.output.is_dir():
            raise DataError(f"{self.output} is a file, expected a directory to make: name another output")
        others = [name for name in os.listdir(self.output) if name != WORK_NAME]
        if others and not self.directory.is_dir():
            raise DataError(f"{self.output} holds other files ({', '.join(sorted(others)[:3])}): name a new directory")

    def begin(self, recipe: Recipe) -> Path:
        """Makes the folders, clears away what killed processes left and returns the folder of this start.

        Raises:
            ConfigError: the unfinished preparation there has another recipe.
        """
        path = self.directory / _RECIPE_NAME
        wanted = json.loads(json.dumps(recipe.as_json()))
        if path.exists():
            found = json.loads(path.read_bytes())
            if found != wanted:
                different = [key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]
                raise ConfigError(
                    f"{self.output} holds an unfinished preparation with another {', '.join(different)} "
                    f"({found.get(different[0])} there, {wanted.get(different[0])} here): give the same options, or "
                    f"remove {self.directory}"
                )
        self.parts.mkdir(parents=True, exist_ok=True)
        publish(path, json.dumps(wanted, indent=2).encode("utf-8"))
        for stale in self.directory.glob("run-*"):
            shutil.rmtree(stale)
        for left in self.directory.rglob(".*.tmp"):
            left.unlink(missing_ok=True)
        run = self.directory / f"run-{uuid.uuid4().hex[:12]}"
        run.mkdir()
        return run

    def finish(self, state: Path) -> None:
        """Moves what is in ``state/output`` to the output, the report last, and removes the working directory."""
        made = state / "output"
        for path in sorted(made.iterdir(), key=lambda path: path.name == REPORT_NAME):
            os.replace(path, self.output / path.name)
        shutil.rmtree(self.directory)
