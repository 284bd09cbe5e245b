"""What a checkpoint of any format is, and how two of them differ; behind tools/inspect_checkpoint.py."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from deberta_dist.checkpoint import strict_json
from deberta_dist.checkpoint.errors import CheckpointError
from deberta_dist.checkpoint.formats import files
from deberta_dist.checkpoint.formats.output import REPORT_NAME, hash_of
from deberta_dist.checkpoint.formats.report import num_parameters
from deberta_dist.checkpoint.formats.source import Source, open_source, to_published
from deberta_dist.checkpoint.formats.weights import Weight, Weights
from deberta_dist.errors import DebertaDistError

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
    (r".*", "other"),
)
_CHUNK = 1 << 22


def inspect(path: Path) -> dict[str, Any]:
    """What is at ``path``, as JSON.

    Args:
        path: See `source.open_source`.

    Raises:
        DebertaDistError: nothing that can be opened.
    """
    source = open_source(path, verify=False)
    weights, problems = _published_or_own(source)
    groups: dict[str, int] = {}
    for name, weight in weights.items():
        group = next(label for pattern, label in _GROUPS if re.fullmatch(pattern, name))
        groups[group] = groups.get(group, 0) + num_parameters({name: weight})
    sizes = _sizes(path if path.is_file() else source.directory)
    return {
        "path": str(path),
        "recognised": source.description,
        "format": source.format.name,
        "step": source.step,
        "layout": None if source.layout is None else dict(source.layout),
        "dtype": sorted({str(weight.dtype).removeprefix("torch.") for weight in weights.values()}),
        "num_parameters": num_parameters(weights),
        "groups": groups,
        "num_tensors": len(weights),
        "config": dict(source.config),
        "files": sizes,
        "num_bytes": sum(sizes.values()),
        "checksums": _checksums(source),
        "problems": problems,
    }


def difference(path: Path, other: Path) -> dict[str, Any]:
    """How two checkpoints differ, by published names where both have them, as JSON.

    Args:
        path: See `source.open_source`.
        other: Likewise.

    Returns:
        ``only_here``, ``only_there``: names. ``shapes``: name -> the two shapes. ``config``: field -> the two values.
        ``values``: name -> largest absolute difference, of tensors that are not bit for bit equal. ``equal``: how
        many tensors are.
    """
    sources = [open_source(p, verify=False) for p in (path, other)]
    (a, _), (b, _) = (_published_or_own(source) for source in sources)
    common = [name for name in a if name in b]
    values: dict[str, float] = {}
    for name in common:
        if a[name].shape == b[name].shape:
            largest = _largest_difference(a[name], b[name])
            if largest is not None:
                values[name] = largest
    shapes = {name: [list(a[name].shape), list(b[name].shape)] for name in common if a[name].shape != b[name].shape}
    configs = [_config(source) for source in sources]
    keys = [key for key in {**configs[0], **configs[1]} if configs[0].get(key) != configs[1].get(key)]
    return {
        "only_here": [name for name in a if name not in b],
        "only_there": [name for name in b if name not in a],
        "shapes": shapes,
        "config": {key: [configs[0].get(key), configs[1].get(key)] for key in keys},
        "values": values,
        "equal": len(common) - len(values) - len(shapes),
    }


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
    lines = [f"{found['equal']} tensors are equal bit for bit, {len(found['values'])} differ"]
    for key, words in (("only_here", "only in the first"), ("only_there", "only in the second")):
        lines += [f"  {words}: {name}" for name in found[key]]
    lines += [f"  shape: {name} {a} and {b}" for name, (a, b) in found["shapes"].items()]
    lines += [f"  config: {key} {a!r} and {b!r}" for key, (a, b) in found["config"].items()]
    for name, value in sorted(found["values"].items(), key=lambda item: -item[1]):
        lines.append(f"  largest difference {value:.6g}: {name}")
    return "\n".join(lines)


def differs(found: Mapping[str, Any]) -> bool:
    """Whether tensors or configurations differ."""
    return any(found[key] for key in ("only_here", "only_there", "shapes", "values", "config"))


def _published_or_own(source: Source) -> tuple[Weights, list[str]]:
    """Weights by published names; by the file's own keys, with the reason, where they do not make a model."""
    try:
        return to_published(source).weights, []
    except DebertaDistError as error:
        return source.weights, [str(error)]


def _config(source: Source) -> dict[str, Any]:
    """Its configuration as published; as it stands in the file where it is refused."""
    try:
        return to_published(source).config.to_dict()
    except DebertaDistError:
        return dict(source.config)


def _sizes(path: Path) -> dict[str, int]:
    paths = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    return {p.name: p.stat().st_size for p in paths}


def _checksums(source: Source) -> str:
    """A sentence: good, damaged and how, or none to compare with."""
    try:
        if source.verify is not None:
            source.verify()
            return "every file is as it was written"
        if source.path.is_file() or not files.has(source.directory, REPORT_NAME):
            return "none recorded"
        report = files.read_json(files.inside(source.directory, REPORT_NAME))
        recorded = strict_json.mapping(report.get("files"), where=f"{REPORT_NAME}: files")
        for name, entry in recorded.items():
            entry = strict_json.fields(entry, keys=("bytes", "sha256"), where=f"{REPORT_NAME}: {name[:100]}")
            if hash_of(files.inside(source.directory, name)) != entry["sha256"]:
                raise CheckpointError(f"{name} is not what was written")
    except CheckpointError as error:
        return f"DAMAGED: {error}"
    return f"all {len(recorded)} files are as they were written"


def _largest_difference(a: Weight, b: Weight) -> float | None:
    """Largest absolute difference, None where the numbers are equal bit for bit; not-a-number where only one has it."""
    x, y = a.read().flatten(), b.read().flatten()
    if x.dtype == y.dtype and torch.equal(x.view(torch.uint8), y.view(torch.uint8)):
        return None
    largest = 0.0
    for begin in range(0, x.numel(), _CHUNK):
        part = (x[begin : begin + _CHUNK].double() - y[begin : begin + _CHUNK].double()).abs().max().item()
        # max() of Python forgets NaN depending on the order.
        largest = part if part != part or part > largest else largest
        if largest != largest:
            break
    same = largest == 0.0 and x.dtype != y.dtype
    return None if same else largest
