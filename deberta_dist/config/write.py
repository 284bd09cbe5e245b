"""Writes the resolved TOML and JSON into a run directory, from which the run can be started again.

``run_config.toml`` names ``deepspeed.json`` beside it; every other path in it is absolute. The three
batch numbers of the JSON are written as ``"auto"``, as they have to be read (see ``deepspeed_json``).
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deberta_dist.config.deepspeed_json import BATCH_KEYS
from deberta_dist.config.finetune import FineTuneConfig
from deberta_dist.config.schema import RunConfig
from deberta_dist.files.atomic import replace_file
from deberta_dist.values import AUTO

TOML_NAME = "run_config.toml"
JSON_NAME = "deepspeed.json"


def write_resolved(
    config: RunConfig | FineTuneConfig, ds: Mapping[str, Any], directory: str | os.PathLike[str]
) -> tuple[Path, Path]:
    """Writes ``run_config.toml`` and ``deepspeed.json``; one process calls it.

    Args:
        config: From ``resolve``.
        ds: From ``deepspeed_config``.
        directory: Made if absent; the files in it are replaced, each at once.

    Returns:
        Paths of the TOML and the JSON.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    loadable = {key: AUTO if key in BATCH_KEYS else value for key, value in ds.items()}
    toml, json_file = folder / TOML_NAME, folder / JSON_NAME
    replace_file(json_file, (json.dumps(loadable, indent=2) + "\n").encode())
    replace_file(toml, to_toml(config).encode())
    return toml, json_file


def to_toml(
    config: RunConfig | FineTuneConfig,
    *,
    head: Sequence[str] | None = None,
    deepspeed: str | Path = JSON_NAME,
    folder: Path | None = None,
) -> str:
    """The configuration as TOML that ``load_config`` reads back to the same values.

    Args:
        config: Of pre-training or fine-tuning, resolved or not.
        head: Lines of comment on top; by default what a run says of itself.
        deepspeed: What stands for ``run.deepspeed``.
        folder: Paths are written as from here, where the file will lie; by default as they are.
    """
    if head is None:
        head = ("Written by the run itself: every default and derived size in full.", f"Read from {config.source!r}.")
    lines = [f"# {line}".rstrip() for line in head]

    def shown(value: Any) -> str:
        return _value(os.path.relpath(value, folder) if folder is not None and isinstance(value, Path) else value)

    for section, table in config.model_dump(exclude_none=True).items():
        lines += ["", f"[{section}]"]
        tables = {key: value for key, value in table.items() if isinstance(value, dict)}
        for key, value in table.items():
            if key not in tables:
                lines.append(f"{_key(key)} = {shown(deepspeed if (section, key) == ('run', 'deepspeed') else value)}")
        for key, inner in tables.items():
            for name, values in inner.items():
                lines += ["", f"[{section}.{key}.{name}]"]
                lines += [f"{_key(inside)} = {shown(value)}" for inside, value in values.items()]
    return "\n".join(lines) + "\n"


def _key(name: str) -> str:
    bare = name.isascii() and name.replace("_", "").replace("-", "").isalnum()
    return name if bare else _value(name)


def _value(value: bool | int | float | str | Path | tuple[Any, ...]) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case tuple() | list():
            return f"[{', '.join(_value(item) for item in value)}]"
        case _:
            # JSON's escapes are TOML's, except that TOML also wants DEL escaped.
            return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
