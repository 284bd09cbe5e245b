"""What a conversion writes: every target format answers the same questions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deberta_dist.conversion.output import OutputDirectory
from deberta_dist.conversion.weights import DroppedKey, Weights


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is to be written.

    Attributes:
        weights: By the target's own keys.
        write: Writes them; returns what a user should know.
        num_bytes: About what they take.
        config_name: File name of the configuration.
        config: Fields of that file.
        lost: Keys that the target has no place for.
        architecture: Hugging Face class; of a program its inputs and outputs; empty for other targets.
        why_class: Why this class and no other, for the model card; empty where there is no choice.
    """

    weights: Weights
    write: Callable[[OutputDirectory], list[str]]
    num_bytes: int
    config_name: str
    config: Mapping[str, Any]
    lost: Sequence[DroppedKey] = ()
    architecture: str = ""
    why_class: str = ""
