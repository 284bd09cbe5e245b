"""Facts about a checkpoint's training for the model card: only numbers that the run itself has recorded."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deberta_dist.checkpoint.manifest import Manifest
from deberta_dist.data.token_corpus import open_corpus
from deberta_dist.errors import DataError, printable

_METRICS_NAME, _RESULT_NAME = "metrics.jsonl", "result.json"


def training_facts(manifest: Manifest, *, run: Path) -> dict[str, str]:
    """Name -> value, for people; what is not known is absent.

    Args:
        manifest: Has the step, the samples read and the run's configuration.
        run: Directory that the checkpoint's run has written.
    """
    config, facts = manifest.run_config, {}
    steps, max_steps = manifest.step, _number(config, "training", "max_steps")
    facts["steps"] = f"{steps:,}" + (f" of {max_steps:,}" if max_steps else "")
    if skipped := manifest.step - manifest.optimizer_steps:
        facts["steps"] += f", of which {skipped:,} were skipped because gradients were not finite"
    length = _number(config, "data", "max_seq_length")
    if length:
        tokens = manifest.consumed_samples * length
        facts["tokens read"] = f"{tokens:,} in sequences of up to {length:,}, special tokens and padding included"
    if batch := _number(config, "training", "global_batch_size"):
        facts["batch"] = f"{batch:,} sequences" + (f", {batch * length:,} tokens" if length else "")
    if rate := _number(config, "optimizer", "learning_rate"):
        warmup = _number(config, "schedule", "warmup_steps")
        facts["learning rate"] = f"{rate:g} at its highest" + (f", after {warmup:,} steps of warm-up" if warmup else "")
    if masked := _number(config, "data", "mask_probability"):
        facts["masking"] = f"{masked:.0%} of the tokens, spans of up to {_number(config, 'data', 'max_ngram') or 1} words"
    facts["precision"] = manifest.precision
    layout = manifest.layout
    facts["layout"] = f"tensor {layout.tensor} x pipeline {layout.pipeline} x data {layout.data} ({layout.schedule})"
    facts["seed"] = str(manifest.seed)
    facts |= _data(manifest)
    facts |= _losses(run, step=steps, is_last=steps == max_steps)
    return facts


def _number(config: Mapping[str, Any], section: str, key: str) -> Any:
    table = config.get(section)
    value = table.get(key) if isinstance(table, Mapping) else None
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _data(manifest: Manifest) -> dict[str, str]:
    """The corpora by the last parts of their paths; their size, where they still are what was read."""
    data, facts = manifest.run_config.get("data"), {}
    if not isinstance(data, Mapping):
        return {}
    sources = data.get("sources")
    paths = {"": data.get("train")} | {
        name: source.get("path")
        for name, source in (sources.items() if isinstance(sources, Mapping) else ())
        if isinstance(source, Mapping)
    }
    for name, path in paths.items():
        if not isinstance(path, str):
            continue
        checksum = manifest.data_sha256.get(f"sources.{name}" if name else "train")
        text = f"`{printable('/'.join(Path(path).parts[-2:]))}`"
        try:
            corpus = open_corpus(Path(path))
        except (DataError, OSError):
            corpus = None
        if corpus is not None and corpus.checksum == checksum:
            text += f", {corpus.num_documents:,} documents, {corpus.num_tokens:,} tokens"
        if checksum:
            text += f", SHA-256 {checksum}"
        facts[f"corpus {name}".strip()] = text
    return facts


def _losses(run: Path, *, step: int, is_last: bool) -> dict[str, str]:
    facts = {}
    for line in _lines(run / _METRICS_NAME):
        if line.get("step") == step and isinstance(line.get("loss"), float):
            facts["training loss"] = f"{line['loss']:.4f} nats at the last step"
    result = next(iter(_lines(run / _RESULT_NAME, whole=True)), {}) if is_last else {}
    loss, accuracy, count = (result.get(key) for key in ("loss", "accuracy", "num_targets"))
    if isinstance(loss, float) and isinstance(accuracy, float) and isinstance(count, int):
        facts["held-out loss"] = f"{loss:.4f} nats, accuracy {accuracy:.2%}, of {count:,} masked tokens"
    return facts


def _lines(path: Path, *, whole: bool = False) -> list[dict[str, Any]]:
    """Objects of a file that people may have edited, or none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    found = []
    for line in [text] if whole else text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found
