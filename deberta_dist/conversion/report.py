"""Reports what became of every key: in full for a file, in short for the terminal."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from deberta_dist.conversion.canonical import CanonicalCheckpoint
from deberta_dist.conversion.source import CheckpointSource
from deberta_dist.conversion.weights import DTYPES, DroppedKey, Weights

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LACKING_WHY = (
    "the source has no such table (Hugging Face's classes do not save it). Only the enhanced mask decoder of masked "
    "language modelling uses it; a pre-training run that starts from here begins with its initial value"
)


def dtype_names(weights: Weights) -> list[str]:
    """Number formats of weights, e.g. ["float32"]."""
    return sorted({_NAMES.get(weight.dtype, str(weight.dtype).removeprefix("torch.")) for weight in weights.values()})


def num_parameters(weights: Weights) -> int:
    """Numbers in all tensors together."""
    return sum(weight.num_bytes // weight.dtype.itemsize for weight in weights.values())


def make_report(
    source: CheckpointSource,
    published: CanonicalCheckpoint,
    *,
    source_dtype: Sequence[str],
    written: Weights,
    lost: Sequence[DroppedKey],
    target_format: str,
    details: Mapping[str, Any],
) -> dict[str, Any]:
    """The report as JSON.

    Args:
        source: Where the weights come from.
        published: The same, where all formats meet.
        source_dtype: Number formats that the source has.
        written: By the keys of the result.
        lost: Keys that the target has no place for.
        target_format: One of `values.CONVERSION_FORMATS`.
        details: What else to say of the target, e.g. files, tokenizer, warnings.
    """
    made_of = [(key, weight) for key, weight in written.items() if weight.origin]
    return {
        "source": {
            "recognised": source.description,
            "format": source.format.name,
            "step": source.step,
            "dtype": list(source_dtype),
            "keys": len(source.weights),
        },
        "target": {"format": target_format, "dtype": dtype_names(written), "keys": len(written)},
        "num_parameters": num_parameters(written),
        "kept": [key for key, weight in made_of if weight.origin == (key,)],
        "changed": [
            {"from": list(weight.origin), "to": key, "why": weight.why or "renamed"}
            for key, weight in made_of
            if weight.origin != (key,)
        ],
        "new": [{"key": key, "why": weight.why} for key, weight in written.items() if not weight.origin],
        "dropped": [{"key": item.key, "why": item.why} for item in (*published.reading.dropped, *lost)],
        "absent": [{"key": key, "why": _LACKING_WHY} for key in published.lacking],
        **details,
    }


def summary(report: Mapping[str, Any]) -> str:
    """A few lines for the screen: counts, and every reason once."""
    source, target = report["source"], report["target"]
    lines = [
        f"found: {source['recognised']}, {source['keys']} keys, {'/'.join(source['dtype'])}",
        f"made:  {target['format']}, {target['keys']} keys, {'/'.join(target['dtype'])}, "
        f"{report['num_parameters']:,} parameters",
        f"keys:  {len(report['kept'])} as they were, {len(report['changed'])} changed, {len(report['new'])} new, "
        f"{len(report['dropped'])} left out, {len(report['absent'])} absent",
    ]
    for group, key in (("changed", "to"), ("new", "key"), ("dropped", "key"), ("absent", "key")):
        reasons = Counter(item["why"] for item in report[group])
        for why, count in reasons.items():
            example = next(item[key] for item in report[group] if item["why"] == why)
            lines.append(f"  {group} {count} (e.g. {example}): {why}")
    lines += [f"  note: {warning}" for warning in report["warnings"]]
    return "\n".join(lines)
