"""Scores as the leaderboard computes them, in percent.

Source: Wang et al. 2019, section 3.3, and the benchmark authors' code, nyu-mll/jiant-v1-legacy@8be1fade.
"""

import math
import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence

from deberta_dist.tasks.release import Key, Split
from deberta_dist.tasks.superglue.benchmark import MAIN_TASKS, TASKS

Answers = Mapping[Key, str]
"""Answer by name for every decision."""


def score(split: Split, answers: Answers) -> dict[str, float]:
    """Every metric of a task on a split whose right answers are known.

    Args:
        split: With gold.
        answers: For every decision of it.
    """
    assert answers.keys() == split.decisions.keys() and all(d.gold for d in split.decisions.values())
    return {name: 100.0 * _METRICS[name](split, answers) for name in split.task.metrics}


def task_score(metrics: Mapping[str, float]) -> float:
    """One number for a task: the mean of its metrics."""
    return sum(metrics.values()) / len(metrics)


def best_constant(split: Split) -> tuple[str, float]:
    """The label that scores most where it answers everything, and that task score: what any model has to beat."""
    scores = {label: task_score(score(split, dict.fromkeys(split.decisions, label))) for label in split.task.labels}
    label = max(scores, key=lambda name: scores[name])
    return label, scores[label]


def overall(scores: Mapping[str, float]) -> tuple[float | None, str]:
    """The leaderboard's average, and how to say it.

    Args:
        scores: Task score by task name; diagnostics are left aside.

    Returns:
        (mean over the eight tasks, text); (None, what is missing) where one is.
    """
    missing = [name for name in MAIN_TASKS if name not in scores]
    if missing:
        have = len(MAIN_TASKS) - len(missing)
        return None, f"{have} of {len(MAIN_TASKS)}, missing {', '.join(missing)}"
    mean = sum(scores[name] for name in MAIN_TASKS) / len(MAIN_TASKS)
    return mean, f"{mean:.1f}"


def accuracy(gold: Sequence[str], found: Sequence[str]) -> float:
    """Share of equal answers."""
    return sum(a == b for a, b in zip(gold, found, strict=True)) / len(gold)


def f1(gold: Sequence[str], found: Sequence[str], *, positive: str) -> float:
    """F1 of one class; 0 where it is neither there nor answered."""
    hits = sum(a == b == positive for a, b in zip(gold, found, strict=True))
    total = sum(a == positive for a in gold) + sum(b == positive for b in found)
    return 2 * hits / total if total else 0.0


def macro_f1(gold: Sequence[str], found: Sequence[str], *, labels: Sequence[str]) -> float:
    """Mean of the F1 of every label, those that do not occur included."""
    return sum(f1(gold, found, positive=label) for label in labels) / len(labels)


def matthews(gold: Sequence[str], found: Sequence[str], *, positive: str) -> float:
    """Correlation of two labels; 0 where one side has one class only."""
    n = Counter((a == positive, b == positive) for a, b in zip(gold, found, strict=True))
    yes, no, miss, false = n[True, True], n[False, False], n[True, False], n[False, True]
    below = (yes + false) * (yes + miss) * (no + false) * (no + miss)
    return (yes * no - false * miss) / math.sqrt(below) if below else 0.0


def normalise_answer(text: str) -> str:
    """A text as SQuAD's and ReCoRD's scorers compare it: no case, punctuation, articles or extra spaces."""
    text = "".join(character for character in text.lower() if character not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_f1(gold: str, found: str) -> float:
    """F1 of the words that two normalised texts share."""
    a, b = normalise_answer(gold).split(), normalise_answer(found).split()
    shared = sum((Counter(a) & Counter(b)).values())
    return 2 * shared / (len(a) + len(b)) if shared else 0.0


def _pairs(split: Split, answers: Answers) -> tuple[list[str], list[str]]:
    return [decision.gold[0] for decision in split.decisions.values()], [answers[key] for key in split.decisions]


def _question_em(split: Split, answers: Answers) -> float:
    """Share of questions of which every answer is judged right."""
    is_right: dict[Key, bool] = defaultdict(lambda: True)
    for key, decision in split.decisions.items():
        is_right[key[:2]] &= answers[key] == decision.gold[0]
    return sum(is_right.values()) / len(is_right)


def _gender_parity(split: Split, answers: Answers) -> float:
    """Share of pairs that get one answer. Pairs are consecutive idx: ``pair_id`` is another number in each row."""
    by_pair: dict[int, set[str]] = defaultdict(set)
    for (idx,), answer in answers.items():
        by_pair[idx // 2].add(answer)
    return sum(len(found) == 1 for found in by_pair.values()) / len(by_pair)


def _over_mentions(measure: Callable[[str, str], float]) -> Callable[[Split, Answers], float]:
    """Mean over queries of the best agreement with an accepted text."""

    def mean(split: Split, answers: Answers) -> float:
        best = [max(measure(gold, answers[key]) for gold in d.gold) for key, d in split.decisions.items()]
        return sum(best) / len(best)

    return mean


_METRICS: Mapping[str, Callable[[Split, Answers], float]] = {
    "accuracy": lambda split, answers: accuracy(*_pairs(split, answers)),
    "macro_f1": lambda split, answers: macro_f1(*_pairs(split, answers), labels=split.task.labels),
    "matthews": lambda split, answers: matthews(*_pairs(split, answers), positive="entailment"),
    "gender_parity": _gender_parity,
    "f1a": lambda split, answers: f1(*_pairs(split, answers), positive="1"),
    "em": lambda split, answers: (
        _question_em(split, answers)
        if split.task is TASKS["MultiRC"]
        else _over_mentions(lambda a, b: float(normalise_answer(a) == normalise_answer(b)))(split, answers)
    ),
    "f1": _over_mentions(token_f1),
}
