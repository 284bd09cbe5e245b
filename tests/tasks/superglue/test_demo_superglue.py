"""The demo's own release: every file can be read, and its rows are what the tasks expect."""

from pathlib import Path

import pytest

from deberta_dist.tasks.base import Release
from deberta_dist.tasks.superglue.benchmark import SUPERGLUE
from deberta_dist.tasks.superglue.tasks import TASKS

FOLDER = Path(__file__).parents[3] / "launchers/demo_superglue"
RELEASE = Release(FOLDER, SUPERGLUE)
SPLITS = [(name, split) for name, task in TASKS.items() for split in task.counts]


@pytest.mark.parametrize(("name", "split"), SPLITS)
def test_every_split_has_its_labels(name: str, split: str) -> None:
    task = TASKS[name]
    decisions = RELEASE.read(task, split).decisions.values()
    gold = {label for decision in decisions for label in decision.gold}
    if split == "test" and not task.is_diagnostic:
        assert not gold
    elif task.labels:
        assert gold == set(task.labels)
    else:
        # The reader does not check this, and an answer elsewhere can never be chosen.
        assert all(decision.gold and set(decision.gold) < set(decision.labels) for decision in decisions)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_offsets_lie_on_their_text(split: str) -> None:
    for row in RELEASE.read(TASKS["WiC"], split).rows:
        for number in "12":
            found = row[f"sentence{number}"][row[f"start{number}"] : row[f"end{number}"]]
            assert found.isalpha() and found[:3].lower() == row["word"][:3].lower()
    for row in RELEASE.read(TASKS["ReCoRD"], split).rows:
        spans = {(entity["start"], entity["end"]) for entity in row["passage"]["entities"]}
        assert "\n@highlight\n" in row["passage"]["text"]
        for query in row["qas"]:
            assert query["query"].count("@placeholder") == 1
            for answer in query.get("answers", []):
                start, end = answer["start"], answer["end"]
                assert (start, end) in spans and row["passage"]["text"][start : end + 1] == answer["text"]


def test_sources_name_every_file() -> None:
    text = (FOLDER / "SOURCES.md").read_text(encoding="utf-8")
    assert {path.name for path in FOLDER.iterdir()} == {*TASKS, "SOURCES.md"}
    assert all(f"| {TASKS[name].data_file(split)} |" in text for name, split in SPLITS)
