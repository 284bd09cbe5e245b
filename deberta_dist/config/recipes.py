"""Reads TOML files without checking their keys: a run's own, and recipe files with one table per task."""

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from deberta_dist.errors import ConfigError
from deberta_dist.files.strict_json import read_configuration

Tables = dict[str, Any]


class TaskRecipe(NamedTuple):
    """Values that take the place of a TOML's: the file and table they stand in, and key by section."""

    path: Path
    name: str
    sections: Mapping[str, Any]


def read_recipes(path: Path, name: str, *, known: Sequence[str]) -> list[TaskRecipe]:
    """What a file of recipes says for one name: its table ``default``, then the name's own.

    Args:
        path: A TOML with a table per name, and in each the sections of a run's TOML.
        name: One of ``known``.
        known: Names that may have a table.

    Raises:
        ConfigError: The file cannot be read, has an unknown table or none for the name.
    """
    tables = read_toml(path)
    if odd := [table for table in tables if table not in ("default", *known)]:
        near = difflib.get_close_matches(odd[0], known, n=1)
        hint = f"; did you mean [{near[0]}]?" if near else f"; known are default, {', '.join(known)}"
        raise ConfigError(f"{path}: unknown table [{odd[0]}]{hint}")
    if name not in tables:
        raise ConfigError(f"{path} has no recipe [{name}]; it has {', '.join(tables)}")
    recipes = []
    for table in ("default", name):
        sections = tables.get(table, {})
        if not isinstance(sections, dict) or not all(isinstance(section, dict) for section in sections.values()):
            raise ConfigError(f"{path}: [{table}] must hold sections, such as training.epochs = 3")
        recipes.append(TaskRecipe(path, table, sections))
    return recipes


def read_toml(path: Path) -> Tables:
    """A TOML file.

    Raises:
        ConfigError: It cannot be read, or is none.
    """
    text = read_configuration(path, shown=str(path), kind="TOML", hint=f"; current directory: {Path.cwd()}")
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        # tomllib's own words for a key given twice
        words = str(error).replace("Cannot overwrite a value", "A key is given twice")
        raise ConfigError(f"{path}: not valid TOML: {words}") from None
