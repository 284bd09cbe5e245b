"""The working directory of a preparation, ``OUTPUT/.work``, which holds finished work until the corpus is complete.

::

    recipe.json          the recipe; one that would make other spool files is refused
    parts/               the spool: encoded ranges of the inputs, named by the file's path, size and time of change
    STATE/duplicates/    documents to drop, per range of hashes; STATE names the recipe and all work items
    STATE/output/        token files, then indexes and report: what moves to OUTPUT at the end
    run-*/               claims and progress of one start
"""

import dataclasses
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deberta_dist.errors import ConfigError, DataError
from deberta_dist.preparation.pipeline.publish import publish
from deberta_dist.preparation.pipeline.recipe import PreparationRecipe
from deberta_dist.preparation.pipeline.report import JSON_NAME, Outcome
from deberta_dist.preparation.pipeline.shards import HELD_OUT, TRAIN
from deberta_dist.preparation.pipeline.work_items import WorkItem
from deberta_dist.preparation.reading.documents import TextReadOptions

WORK_NAME = ".work"
_RECIPE_NAME = "recipe.json"


class Workspace:
    """Paths of one preparation.

    Args:
        output: directory that the corpus is made in.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.directory = output / WORK_NAME
        self.spool = self.directory / "parts"

    def state(self, recipe: PreparationRecipe, work_items: Sequence[WorkItem]) -> Path:
        """Where the results live that depend on all work items."""
        identity = json.dumps([recipe.as_json(), [item.name for item in work_items], [item.file.source for item in work_items]])
        return self.directory / hashlib.sha256(identity.encode("utf-8")).hexdigest()[:20]

    def refuse_foreign(self) -> None:
        """Refuses an output that is no unfinished preparation.

        Raises:
            DataError: it is complete, or holds something else.
        """
        if (self.output / JSON_NAME).exists():
            self.remove()  # the process that completed it may have been killed before it could
            raise DataError(f"{self.output} is a complete corpus and is not overwritten: name another output, or move it away")
        if not self.output.exists():
            return
        if not self.output.is_dir():
            raise DataError(f"{self.output} is a file, expected a directory to make: name another output")
        others = [name for name in os.listdir(self.output) if name != WORK_NAME]
        if others and not self.directory.is_dir():
            raise DataError(f"{self.output} holds other files ({', '.join(sorted(others)[:3])}): name a new directory")

    def made(self, state: Path) -> Path:
        """Where what will be the output is made."""
        return state / "output"

    def duplicates(self, state: Path) -> Path:
        """Where lists of duplicates are kept."""
        return state / "duplicates"

    def finished(self, state: Path) -> Outcome | None:
        """What a start has made that was killed before all of it had moved to the output; None without one."""
        path = self.made(state) / JSON_NAME
        return Outcome.from_json(json.loads(path.read_bytes())) if path.exists() else None

    def begin(self, recipe: PreparationRecipe, *, state: Path) -> Path:
        """Makes the folders, clears away what killed processes left and returns the folder of this start.

        Raises:
            ConfigError: the unfinished preparation there has a recipe whose spool files would be others.
            DataError: it has other inputs, and part of its output is in its place already.
        """
        path = self.directory / _RECIPE_NAME
        wanted = json.loads(json.dumps(recipe.as_json()))
        if path.exists():
            found = json.loads(path.read_bytes())
            if different := _unusable(found, wanted):
                key = different[0]
                raise ConfigError(
                    f"{self.output} holds an unfinished preparation with another {', '.join(different)} "
                    f"({_value(found, key)} there, {_value(wanted, key)} here): give the same options, or remove "
                    f"{self.directory}"
                )
        moved = [name for name in (TRAIN, HELD_OUT) if (self.output / name).exists()]
        if moved and self.finished(state) is None:
            raise DataError(
                f"{self.output}/{moved[0]} is there already, made of other inputs: give its inputs to "
                "finish it, or name another output"
            )
        for folder in (self.spool, self.duplicates(state), self.made(state)):
            folder.mkdir(parents=True, exist_ok=True)
        publish(path, json.dumps(wanted, indent=2).encode("utf-8"))
        for stale in self.directory.glob("run-*"):
            shutil.rmtree(stale, ignore_errors=True)  # a process of that start may be ending just now
        for left in self.directory.rglob(".*.tmp"):
            left.unlink(missing_ok=True)
        run = self.directory / f"run-{uuid.uuid4().hex[:12]}"
        run.mkdir()
        return run

    def publish(self, state: Path) -> None:
        """Moves what was made to the output, the report last."""
        # The report is what makes a corpus complete: a start that is killed before it resumes here.
        for path in sorted(self.made(state).iterdir(), key=lambda path: path.name == JSON_NAME):
            os.replace(path, self.output / path.name)

    def remove(self) -> None:
        """Removes the working directory of a complete corpus; what is left is harmless, and the next start tries again."""
        shutil.rmtree(self.directory, ignore_errors=True)


# Spool files do not depend on these.
_LATER = ("shard_bytes", "deduplicate", "piece_bytes")


def _unusable(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Settings because of which parts of the recipe ``found`` cannot serve ``wanted``.

    What was an error may be allowed by now: no spool file holds such a document. So a user with a bad document may
    change that option and go on.
    """
    different = [key for key in sorted({*found, *wanted} - {*_LATER}) if found.get(key) != wanted.get(key)]
    if "near_duplicates" in different and found.get("near_duplicates") is not None:
        different.remove("near_duplicates")  # the signatures are there, and the threshold comes later
    if "reading" not in different:
        return different
    different.remove("reading")
    # An option that was not there yet had its default.
    old, new = {**dataclasses.asdict(TextReadOptions()), **found.get("reading", {})}, wanted["reading"]
    for key in sorted({*old, *new}):
        was_error = old.get("invalid_utf8" if key == "invalid_utf8" else "bad_records") == "error"
        is_wider = key != "max_document_bytes" or new[key] > old.get(key, 0)
        may_change = key in ("invalid_utf8", "bad_records", "max_document_bytes")
        if old.get(key) != new.get(key) and not (may_change and was_error and is_wider):
            different.append(f"reading.{key}")
    return different


def _value(recipe: dict[str, Any], key: str) -> Any:
    for name in key.split("."):
        recipe = recipe.get(name, {})
    return recipe
