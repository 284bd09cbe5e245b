"""What fine-tuning starts from: any checkpoint's backbone, its tokenizer, and a new or loaded classifier."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from deberta_dist.checkpoint.manifest import MANIFEST_NAME
from deberta_dist.conversion import files
from deberta_dist.conversion.canonical import to_canonical
from deberta_dist.conversion.find_tokenizer import find_tokenizer, own_spm, unread_settings
from deberta_dist.conversion.official import GENERATORS_HEAD
from deberta_dist.conversion.options import AS_IT_IS, CheckpointReadOptions
from deberta_dist.conversion.source import is_run, open_source
from deberta_dist.conversion.weights import Weights, shorten
from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.errors import ConfigError, DataError
from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.initialisation import initial_tensor


@dataclass(frozen=True)
class StartingPoint:
    """A checkpoint to fine-tune.

    Attributes:
        path: The checkpoint, as the command line names it.
        description: What was recognised.
        config: Sizes and switches of its encoder.
        weights: By published name, unread.
        label_names: Of its classifier's rows; empty where it has none or they have no names.
        tokenizer: The SentencePiece model beside the checkpoint, or the one that was named.
        notes: What a user should know, one line each.
    """

    path: Path
    description: str
    config: DebertaConfig
    weights: Weights
    label_names: tuple[str, ...]
    tokenizer: Tokenizer
    notes: tuple[str, ...]

    def reader(self, shapes: Mapping[str, tuple[int, ...]], *, labels: Sequence[str], seed: int) -> Callable[[str], Tensor]:
        """Where each parameter of a classifier starts: full, float32.

        Args:
            shapes: Full shape of every parameter, by published name.
            labels: Names of the classifier's rows; empty where it has one row for all choices.
            seed: Decides what is new, a function of (seed, name).
        """
        rows = self._classifier_rows(labels)

        def read(name: str) -> Tensor:
            is_classifier = name.startswith("classifier.")
            if name in self.weights and (not is_classifier or rows is not None):
                full = self.weights[name].read().float()
                return full[rows] if is_classifier else full
            return initial_tensor(name, shapes[name], seed=seed, std=self.config.initializer_range)

        return read

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names and numbers of the vectors, biases and LayerNorms: what distinguishes one checkpoint from another
        without reading the gigabytes of its matrices."""
        found = hashlib.sha256()
        for name, weight in sorted(self.weights.items()):
            if len(weight.shape) == 1:
                found.update(name.encode() + weight.read().float().contiguous().numpy().tobytes())
        return found.hexdigest()

    def origin(self, labels: Sequence[str]) -> str:
        """One line on what a task with these labels takes from here."""
        what = "classifier by the names of its labels" if self._classifier_rows(labels) is not None else "new classifier"
        pooler = "" if "pooler.dense.weight" in self.weights else ", new pooler"
        return f"starts from {self.path} ({self.description}): {what}{pooler}"

    def _classifier_rows(self, labels: Sequence[str]) -> Tensor | None:
        """Row of the checkpoint's classifier for every label.

        By name, since their order differs in every code base; without case, since not all code bases write it alike.
        Only inference's labels: "true" of one task has nothing to do with "true" of another.
        """
        if "entailment" not in labels:
            return None
        there = [name.lower() for name in self.label_names]
        if sorted(label.lower() for label in labels) != sorted(there):
            return None
        return torch.tensor([there.index(label.lower()) for label in labels])


def open_starting_point(
    path: Path, *, tokenizer: Path | None, verify: bool, options: CheckpointReadOptions = AS_IT_IS
) -> StartingPoint:
    """Opens a checkpoint of any form, before any process group exists.

    Args:
        path: A run's checkpoint or its weights, released weights, a Hugging Face directory.
        tokenizer: A SentencePiece model given by the user; by default the one that lies with the checkpoint.
        verify: For a run's own checkpoint, compare every byte with its checksums; one rank is enough.
        options: What the user says about it.

    Raises:
        ConfigError: there is no tokenizer, or the path is a run, whose newest checkpoint may change.
        DataError: the checkpoint is refused, or the tokenizer is another model's.
    """
    if is_run(path) and not files.has(path, MANIFEST_NAME):
        raise ConfigError(
            f"--init {path} is a run, whose newest checkpoint may change while ranks look: name its weights/ or one of "
            "its checkpoints"
        )
    source = open_source(path, verify=verify, options=options)
    published = to_canonical(source)
    own = own_spm(source)
    if tokenizer is not None and not source.is_file and own is not None:
        given, there = Tokenizer(tokenizer).sha256, Tokenizer(own).sha256
        if given != there:
            raise DataError(
                f"--tokenizer {tokenizer} has SHA-256 {given[:12]}..., {own} {there[:12]}...: it is another model's"
            )
    found, why = find_tokenizer(source, given=tokenizer, config=published.config)
    if found is None:
        raise ConfigError(f"--init {path}: {why.rstrip('.')}")
    names = _label_names(published.labels) if published.head in ("sequence", "choice") else ()
    used = ("deberta.", "pooler.", *(["classifier."] if published.head != "token" else []))
    unused = [name for name in published.weights if not name.startswith(used)]
    # Whose head predicts words does not matter to a classifier.
    warnings = [text for text in published.reading.warnings if text != GENERATORS_HEAD]
    notes = [f"warning: {text}" for text in (*warnings, *unread_settings(source))]
    notes += [f"not used: {shorten(unused)}"] if unused else []
    return StartingPoint(path, source.description, published.config, published.weights, names, found, tuple(notes))


def _label_names(labels: Mapping[str, object]) -> tuple[str, ...]:
    names = labels.get("id2label")
    if not isinstance(names, dict):
        return ()
    return tuple(str(names.get(str(i), names.get(i))) for i in range(len(names)))
