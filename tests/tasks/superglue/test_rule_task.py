"""The task whose answers follow a rule: its rows do, and nothing but the order of words tells."""

import json
import subprocess
import sys
from pathlib import Path

from deberta_dist.tasks.base import Release
from deberta_dist.tasks.superglue.benchmark import SUPERGLUE
from deberta_dist.tasks.superglue.tasks import TASKS
from tests.tool_calls import call

ROOT = Path(__file__).parents[3]
TEXT = ROOT / "launchers" / "demo_text"


def words_of(out: Path, *words: str) -> list[str]:
    return ["--heldout", str(TEXT / "valid.jsonl"), "--train", str(TEXT / "train.jsonl"), "--out", str(out), *words]


def make(out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "make_rule_task.py"), *words_of(out, *words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_labels_follow_the_order_of_words(tmp_path: Path) -> None:
    result = make(tmp_path / "a", "--rows", "200")
    assert result.returncode == 0, result.stderr
    release = Release(tmp_path / "a", SUPERGLUE)
    heldout = " ".join(" ".join(json.loads(line)["text"].split()) for line in (TEXT / "valid.jsonl").open())
    for split, count in (("train", 200), ("val", 20), ("test", 20)):
        read = release.read(TASKS["RTE"], split)
        assert len(read.rows) == count
        for row in read.rows:
            words = row["hypothesis"].split()
            in_order = " ".join(words) in row["premise"]
            assert in_order != (" ".join(words[::-1]) in row["premise"]) or words == words[::-1]
            assert split == "test" or in_order == (row["label"] == "entailment") or words == words[::-1]
            assert (row["premise"] in heldout) == (split != "train")
            assert split != "test" or "label" not in row
    labels = [row["label"] for row in release.read(TASKS["RTE"], "train").rows]
    assert labels.count("entailment") == 100


def test_the_same_every_time_and_nothing_is_replaced(tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert make(tmp_path / name, "--rows", "50").returncode == 0
    files = sorted((tmp_path / "a" / "RTE").iterdir())
    assert [path.read_bytes() for path in files] == [(tmp_path / "b" / "RTE" / path.name).read_bytes() for path in files]
    again = call("make_rule_task.py", *words_of(tmp_path / "a", "--rows", "50"), cwd=tmp_path)
    assert again.returncode == 65 and "exists already" in again.stderr
    few = call("make_rule_task.py", *words_of(tmp_path / "c", "--rows", "10000000"), cwd=tmp_path)
    assert few.returncode == 65 and "are needed" in few.stderr and not (tmp_path / "c").exists()
