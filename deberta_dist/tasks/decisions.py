"""A decision: one thing to answer, under a key of the data's own that predictions, scores and submissions share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Key = tuple[Any, ...]
"""Whole numbers, or texts where the data's ids are texts, of one kind within a task: (idx,) of most data, (passage,
question, answer) where answers are nested."""
Probabilities = Mapping[Key, Mapping[str, float]]
"""Label or candidate -> probability, for every decision."""
Answers = Mapping[Key, str]
"""Answer by name for every decision."""


@dataclass(frozen=True)
class Decision:
    """One thing to decide.

    Attributes:
        labels: What may be answered, by name; where every decision has candidates of its own, each text once.
        gold: Right answers by name: one, or every accepted text; empty where they are not public.
        line: Of the file, from 1.
    """

    labels: tuple[str, ...]
    gold: tuple[str, ...]
    line: int


def shown(key: Key) -> str:
    """A key for messages: its parts between slashes."""
    return "/".join(map(str, key))
