"""Describes a checkpoint of any format, and compares two; called by ``deberta-dist inspect``."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from deberta_dist.checkpoint.compatible import computation
from deberta_dist.checkpoint.errors import CheckpointError, strict_json
from deberta_dist.conversion import files
from deberta_dist.conversion.canonical import as_asked, to_canonical
from deberta_dist.conversion.options import AS_IT_IS, CheckpointReadOptions
from deberta_dist.conversion.output import REPORT_NAME, hash_of
from deberta_dist.conversion.report import num_parameters
from deberta_dist.conversion.source import CheckpointSource, open_source
from deberta_dist.conversion.weights import Weight, Weights
from deberta_dist.errors import ConfigError, DebertaDistError

_GROUPS = (
    (r"deberta\.embeddings\.word_embeddings\..*", "word embeddings"),
    (r"deberta\.embeddings\.position_embeddings\..*", "position embeddings (enhanced mask decoder)"),
    (r"deberta\.embeddings\..*", "other embeddings"),
    (r"deberta\.encoder\.layer\..*", "layers"),
    (r"deberta\.encoder\.(rel_embeddings|LayerNorm)\..*", "relative positions"),
    (r"deberta\.encoder\.conv\..*", "convolution"),
    (r"lm_predictions\..*", "masked language modelling head"),
    (r"mask_predictions\..*", "replaced token detection head"),
    (r"(pooler|classifier)\..*", "classifier"),
    (r"qa_outputs\..*", "question answering head"),
    (r".*", "other"),
)
_CHUNK = 1 << 22


def inspect(path: Path, options: CheckpointReadOptions = AS_IT_IS) -> dict[str, Any]:
    """What is at ``path``, as JSON.

    Args:
        path: See `source.open_source`.
        options: What the user says about it.

    Raises:
        DebertaDistError: nothing that can be opened.
    """
    source = open_source(path, verify=False, options=options)
    weights, config, problems = _published_or_own(source, is_resolved=False)
    groups: dict[str, int] = {}
    for name, weight in weights.items():
        group = next(label for pattern, label in _GROUPS if re.fullmatch(pattern, name))
        groups[group] = groups.get(group, 0) + num_parameters({name: weight})
    sizes = _sizes(path if path.is_file() else source.directory)
    checksums, is_damaged = _checksums(source)
    return {
        "path": str(path),
        "recognised": source.description,
        "format": source.format.name,
        "step": source.step,
        "layout": None if source.layout is None else dict(source.layout),
        "dtype": sorted({_dtype(weight) for weight in weights.values()}),
        "num_parameters": num_parameters(weights),
        "groups": groups,
        "num_tensors": len(weights),
        "config": config,
        "files": sizes,
        "num_bytes": sum(sizes.values()),
        "checksums": checksums,
        "is_damaged": is_damaged,
        "problems": [*source.warnings, *problems],
    }


def difference(path: Path, other: Path, options: CheckpointReadOptions = AS_IT_IS) -> dict[str, Any]:
    """How two checkpoints differ, by published names where both have them, as JSON.

    Args:
        path: See `source.open_source`.
        other: The checkpoint that it is compared with; anything that can be converted.
        options: What the user says about them: patterns for both, the prefix for those that have it.

    Returns:
        ``only_here``, ``only_there``: names. ``shapes``, ``dtypes``: name -> what both have. ``config``: field -> the
        two values. ``values``: name -> largest absolute difference, of tensors whose numbers are not all equal; text
        where it is no finite number. ``equal``: how many tensors are equal bit for bit.
    """
    sources = [_open(p, options) for p in (path, other)]
    if options.prefix is not None and not any(source.options.prefix for source in sources):
        raise ConfigError(f"--prefix {options.prefix}: no key of {path} and of {other} begins with it")
    (a, here, _), (b, there, _) = (_published_or_own(source, is_resolved=True) for source in sources)
    common = [name for name in a if name in b]
    found: dict[str, Any] = {
        "only_here": [name for name in a if name not in b],
        "only_there": [name for name in b if name not in a],
        "shapes": {n: [list(a[n].shape), list(b[n].shape)] for n in common if a[n].shape != b[n].shape},
        "dtypes": {n: [_dtype(a[n]), _dtype(b[n])] for n in common if a[n].dtype != b[n].dtype},
        "config": {key: [here.get(key), there.get(key)] for key in {**here, **there} if here.get(key) != there.get(key)},
        "values": {},
    }
    num_equal = 0
    for name in common:
        if name in found["shapes"]:
            continue
        largest = _largest_difference(a[name], b[name])
        if largest is not None:
            found["values"][name] = largest
        elif name not in found["dtypes"]:
            num_equal += 1
    return {**found, "equal": num_equal}


def describe(found: Mapping[str, Any]) -> str:
    """`inspect` for the screen."""
    lines = [
        f"{found['path']}: {found['recognised']}",
        f"  {found['num_parameters']:,} parameters in {found['num_tensors']} tensors, {'/'.join(found['dtype'])}, "
        f"{found['num_bytes']:,} bytes in {len(found['files'])} files",
    ]
    lines += [f"  {count:>15,}  {group}" for group, count in found["groups"].items()]
    if found["layout"] is not None:
        lines.append("  written by: " + ", ".join(f"{key} {value}" for key, value in found["layout"].items()))
    config = {key: value for key, value in found["config"].items() if not isinstance(value, dict)}
    lines.append("  config: " + ", ".join(f"{key} {value}" for key, value in config.items()))
    lines.append(f"  checksums: {found['checksums']}")
    return "\n".join(lines + [f"  problem: {problem}" for problem in found["problems"]])


def describe_difference(found: Mapping[str, Any]) -> str:
    """`difference` for the screen, largest first."""
    lines = [f"{found['equal']} tensors are equal bit for bit, {len(found['values'])} have other numbers"]
    for key, words in (("only_here", "only in the first"), ("only_there", "only in the second")):
        lines += [f"  {words}: {name}" for name in found[key]]
    lines += [f"  shape: {name} {a} and {b}" for name, (a, b) in found["shapes"].items()]
    formats = Counter(tuple(pair) for pair in found["dtypes"].values())
    lines += [f"  number format: {count} tensors are {a} and {b}" for (a, b), count in formats.items()]
    lines += [f"  config: {key} {a!r} and {b!r}" for key, (a, b) in found["config"].items()]
    values = found["values"].items()
    for name, value in sorted(values, key=lambda item: -math.inf if isinstance(item[1], str) else -item[1]):
        lines.append(f"  largest difference {value if isinstance(value, str) else f'{value:.6g}'}: {name}")
    return "\n".join(lines)


def differs(found: Mapping[str, Any]) -> bool:
    """Whether tensors or configurations differ."""
    return any(found[key] for key in ("only_here", "only_there", "shapes", "dtypes", "values", "config"))


def _open(path: Path, options: CheckpointReadOptions) -> CheckpointSource:
    """One of two checkpoints, of which only the other may have the prefix."""
    try:
        return open_source(path, verify=False, options=options)
    except ConfigError:
        if options.prefix is None:
            raise
        return open_source(path, verify=False, options=replace(options, prefix=None))


def _published_or_own(source: CheckpointSource, *, is_resolved: bool) -> tuple[Weights, dict[str, Any], list[str]]:
    """Weights and configuration as published; as they stand in the file, with the reason, where they make no model.

    Args:
        source: Where the weights are; formats that cannot be converted are shown under their own names.
        is_resolved: Fields that are absent and mean something else's value have that value.
    """
    try:
        model = as_asked(to_canonical(source), source.options)
    except DebertaDistError as error:
        return source.weights, dict(source.config), [str(error)]
    config = {**model.config.to_dict(), **computation(model.config)} if is_resolved else model.config.to_dict()
    return model.weights, {**config, **model.labels}, []


def _dtype(weight: Weight) -> str:
    return str(weight.dtype).removeprefix("torch.")


def _sizes(path: Path) -> dict[str, int]:
    paths = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    return {p.name: p.stat().st_size for p in paths}


def _checksums(source: CheckpointSource) -> tuple[str, bool]:
    """A sentence, and whether something is not as it was written."""
    try:
        if source.verify is not None:
            source.verify()
            return "every file is as it was written", False
        if source.is_file or not files.has(source.directory, REPORT_NAME):
            return "none recorded", False
        report = files.read_json(files.inside(source.directory, REPORT_NAME))
        recorded = strict_json.mapping(report.get("files"), where=f"{REPORT_NAME}: files")
        for name, entry in recorded.items():
            entry = strict_json.fields(entry, keys=("bytes", "sha256"), where=f"{REPORT_NAME}: {name[:100]}")
            if hash_of(files.inside(source.directory, name)) != entry["sha256"]:
                raise CheckpointError(f"{name} is not what was written")
    except CheckpointError as error:
        return f"DAMAGED: {error}", True
    return f"all {len(recorded)} files are as they were written", False


def _largest_difference(a: Weight, b: Weight) -> float | str | None:
    """Largest absolute difference of two equally shaped tensors, None where all numbers are equal.

    "inf" or "nan" where it is not finite: JSON has no such numbers.
    """
    x, y = a.read().flatten(), b.read().flatten()
    if x.dtype == y.dtype and torch.equal(x.view(torch.uint8), y.view(torch.uint8)):
        return None
    largest = torch.tensor(0.0, dtype=torch.float64)
    is_different = x.dtype == y.dtype  # equal numbers of other bits: zero with a minus sign
    for p, q in zip(x.split(_CHUNK), y.split(_CHUNK), strict=True):
        p, q = p.double(), q.double()
        same = (p == q) | (p.isnan() & q.isnan())
        is_different |= not same.all()
        # max of torch keeps NaN, whatever comes later.
        largest = torch.maximum(largest, torch.where(same, 0.0, (p - q).abs()).max())
    if not is_different:
        return None
    value = largest.item()
    return value if math.isfinite(value) else str(value)
