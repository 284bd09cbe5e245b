"""Scores against scikit-learn where it has them, by hand where it has not, and the published averages."""

import random
import re

import pytest
import sklearn.metrics

from deberta_dist.tasks import metrics
from deberta_dist.tasks.base import PublishedScores, Release, Split
from deberta_dist.tasks.decisions import Decision
from deberta_dist.tasks.superglue.benchmark import SUPERGLUE, TABLE_5
from deberta_dist.tasks.superglue.tasks import TASKS


@pytest.mark.parametrize("row", TABLE_5, ids=lambda row: row.name)
def test_published_averages(row: PublishedScores) -> None:
    scores = {name: metrics.task_score(found) for name, found in row.metrics.items()}
    mean, text = SUPERGLUE.overall(scores)
    # Rounded up where the mean is just between two: 84.55 and 89.25.
    assert mean == pytest.approx(row.average, abs=0.0501)
    if row.name.startswith("DeBERTa"):
        assert text == f"{row.average:.1f}"
    assert SUPERGLUE.overall({**scores, "AX-b": 1.0})[1] == text
    del scores["WSC"]
    assert SUPERGLUE.overall(scores) == (None, "7 of 8, missing WSC")


@pytest.mark.parametrize("seed", range(5))
def test_against_scikit_learn(seed: int) -> None:
    draw = random.Random(seed)
    labels = TASKS["CB"].labels
    gold, found = ([draw.choice(labels[: 1 + seed]) for _ in range(50)] for _ in range(2))
    assert metrics.accuracy(gold, found) == pytest.approx(sklearn.metrics.accuracy_score(gold, found))
    expected = sklearn.metrics.f1_score(gold, found, labels=list(labels), average="macro", zero_division=0)
    assert metrics.macro_f1(gold, found, labels=labels) == pytest.approx(expected)
    expected = sklearn.metrics.f1_score(gold, found, labels=[labels[0]], average="macro", zero_division=0)
    assert metrics.f1(gold, found, positive=labels[0]) == pytest.approx(expected)
    gold, found = ([draw.choice(["entailment", "not_entailment"]) for _ in range(50)] for _ in range(2))
    expected = sklearn.metrics.matthews_corrcoef(gold, found)
    assert metrics.matthews(gold, found, positive="entailment") == pytest.approx(expected)


def test_one_class_alone() -> None:
    gold = ["entailment", "not_entailment"]
    assert metrics.matthews(gold, ["entailment"] * 2, positive="entailment") == 0.0
    assert metrics.f1(["0", "0"], ["0", "0"], positive="1") == 0.0
    # A class that is neither there nor answered is in the mean of CB.
    assert metrics.macro_f1(["entailment"], ["entailment"], labels=TASKS["CB"].labels) == pytest.approx(1 / 3)


def test_questions_with_every_answer_right(release: Release) -> None:
    split = release.read(TASKS["MultiRC"], "val")
    right = {key: decision.gold[0] for key, decision in split.decisions.items()}
    assert metrics.score(split, right) == {"f1a": 100.0, "em": 100.0}
    # One wrong answer of ten: four right of label 1 stay, one is answered too much; one question of four is lost.
    wrong = {**right, (1, 0, 0): "1"}
    assert metrics.score(split, wrong) == pytest.approx({"f1a": 100 * 8 / 9, "em": 75.0})


def test_words_of_an_answer(release: Release) -> None:
    assert metrics.normalise_answer("  The  U.S. Congress, an ANSWER! ") == "us congress answer"
    assert metrics.token_f1("the big red ball", "a red ball") == pytest.approx(2 * 2 / 5)
    assert metrics.token_f1("x", "y") == 0.0 and metrics.token_f1("the", "a") == 0.0
    task, labels = TASKS["ReCoRD"], ("Ada Lovelace", "Lovelace", "Babbage")
    decisions = {(0,): Decision(labels, ("Ada Lovelace", "Countess Lovelace"), 1), (1,): Decision(labels, ("babbage",), 2)}
    split = Split(task, "val", "here", "", (), decisions)
    # 2/3 against the nearer of two accepted texts; equal after normalisation.
    assert metrics.score(split, {(0,): "Lovelace", (1,): "Babbage"}) == pytest.approx({"f1": 100 * (2 / 3 + 1) / 2, "em": 50.0})


def test_pairs_of_genders_are_neighbours() -> None:
    task = TASKS["AX-g"]
    decisions = {(i,): Decision(task.labels, ("entailment",), i + 1) for i in (3, 0, 1, 2)}
    split = Split(task, "test", "here", "", (), decisions)
    answers = {(0,): "entailment", (1,): "entailment", (2,): "entailment", (3,): "not_entailment"}
    assert metrics.score(split, answers) == {"gender_parity": 50.0, "accuracy": 75.0}


def test_every_task_has_its_metrics(release: Release) -> None:
    for task in TASKS.values():
        split = release.read(task, "val" if "val" in task.counts else "test")
        right = {key: decision.gold[0] for key, decision in split.decisions.items()}
        found = metrics.score(split, right)
        assert tuple(found) == task.metrics and all(re.fullmatch("[a-z0-9_]+", name) for name in found)
        # Two labels in pairs of neighbours: AX-g's own rows differ in each.
        assert {k: v for k, v in found.items() if k != "gender_parity"} == {k: 100.0 for k in found if k != "gender_parity"}
