"""Scores in percent, and the measures that tasks are made of.

Source: Wang et al. 2019, section 3.3, and the benchmark authors' code, nyu-mll/jiant-v1-legacy@8be1fade.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from deberta_dist.tasks.base import Measure, Split
from deberta_dist.tasks.decisions import Answers


def score(split: Split, answers: Answers) -> dict[str, float]:
    """Every metric of a task on a split whose right answers are known, percent.

    Args:
        split: A split whose decisions have labels.
        answers: Decision key to answer, one for every decision of the split.
    """
    assert answers.keys() == split.decisions.keys() and all(d.gold for d in split.decisions.values())
    return {name: 100.0 * measure(split, answers) for name, measure in split.task.measures.items()}


def task_score(metrics: Mapping[str, float]) -> float:
    """One number for a task: the mean of its metrics."""
    return sum(metrics.values()) / len(metrics)


def best_constant(split: Split) -> tuple[str, float]:
    """The label that scores most where it answers everything, and that task score: what any model has to beat."""
    scores = {label: task_score(score(split, dict.fromkeys(split.decisions, label))) for label in split.task.labels}
    label = max(scores, key=lambda name: scores[name])
    return label, scores[label]


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
    """A text as scorers of answers in words compare it: no case, punctuation, articles or extra spaces."""
    text = "".join(character for character in text.lower() if character not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_f1(gold: str, found: str) -> float:
    """F1 of the words that two normalised texts share."""
    a, b = normalise_answer(gold).split(), normalise_answer(found).split()
    shared = sum((Counter(a) & Counter(b)).values())
    return 2 * shared / (len(a) + len(b)) if shared else 0.0


def exact_match(gold: str, found: str) -> float:
    """1 where two texts are equal after normalisation, else 0."""
    return float(normalise_answer(gold) == normalise_answer(found))


def answer_accuracy(split: Split, answers: Answers) -> float:
    """`accuracy` of a split's answers."""
    return accuracy(*_pairs(split, answers))


def answer_macro_f1(split: Split, answers: Answers) -> float:
    """`macro_f1` of a split's answers over all labels of its task."""
    return macro_f1(*_pairs(split, answers), labels=split.task.labels)


def answer_f1(split: Split, answers: Answers, *, positive: str) -> float:
    """`f1` of a split's answers."""
    return f1(*_pairs(split, answers), positive=positive)


def answer_matthews(split: Split, answers: Answers, *, positive: str) -> float:
    """`matthews` of a split's answers."""
    return matthews(*_pairs(split, answers), positive=positive)


def over_mentions(measure: Callable[[str, str], float]) -> Measure:
    """Mean over decisions of the best agreement of an answer with an accepted text.

    Args:
        measure: Of (accepted text, answer).
    """

    def mean(split: Split, answers: Answers) -> float:
        best = [max(measure(gold, answers[key]) for gold in d.gold) for key, d in split.decisions.items()]
        return sum(best) / len(best)

    return mean


def _pairs(split: Split, answers: Answers) -> tuple[list[str], list[str]]:
    return [decision.gold[0] for decision in split.decisions.values()], [answers[key] for key in split.decisions]
