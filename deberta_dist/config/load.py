"""TOML file + dotted overrides -> validated sections, or one ConfigError that lists every problem.

Called by the ``main`` of each entry point, before anything heavy is imported. ``load_config`` takes the
schema as an argument, so that other runs (fine-tuning) share files, overrides and messages.
"""

import copy
import difflib
import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, overload

from pydantic import BaseModel, ValidationError, create_model
from pydantic.fields import FieldInfo

from deberta_dist.config.recipes import Tables, TaskRecipe, read_toml
from deberta_dist.config.schema import RunConfig
from deberta_dist.config.section import WholeFile
from deberta_dist.errors import ConfigError

COMMAND_LINE = "command line"
# Stands for the names of a table of tables.
ANY_NAME = "NAME"

# Pydantic's types of error of a number that is out of its range; it names one end alone.
RANGE_ERRORS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number")

Sources = dict[tuple[str, ...], str]
Schema = TypeVar("Schema", bound=BaseModel)


@overload
def load_config(
    toml_path: str | os.PathLike[str], overrides: Sequence[str] = (), *, recipes: Sequence[TaskRecipe] = ()
) -> RunConfig: ...
@overload
def load_config(
    toml_path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    schema: type[Schema],
    recipes: Sequence[TaskRecipe] = (),
) -> Schema: ...
def load_config(
    toml_path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    schema: type[BaseModel] = RunConfig,
    recipes: Sequence[TaskRecipe] = (),
) -> BaseModel:
    """Reads a run's TOML and applies recipes, then overrides from the command line.

    Args:
        toml_path: The file. Relative paths in it are relative to the folder it lies in.
        overrides: ``--section.key value`` or ``--section.key=value``; ``--section.key.NAME.key`` in a table of
            tables. A value is read as TOML, and as plain text where it is none. Relative paths are relative to the
            current directory.
        schema: Class of the whole; its fields are the tables.
        recipes: Take the place of what the TOML says, a later one of an earlier one's.

    Raises:
        ConfigError: File missing, no TOML, duplicate, unknown or missing key, wrong value; all
            problems in one message, each with its file, key and what is expected.
    """
    path = Path(toml_path)
    tables, sources = read_tables(path, overrides, schema=schema, recipes=recipes)
    for name, field in schema.model_fields.items():
        if _mentions(field.annotation, BaseModel):
            tables.setdefault(name, {})  # so that the missing keys are named, not the missing table
    try:
        config = schema.model_validate(tables)
    except ValidationError as error:
        raise ConfigError(_report(_problems(error, schema, sources, str(path)), path)) from None
    if isinstance(config, WholeFile):
        config._source = path
    return config


def load_table(toml_path: str | os.PathLike[str], overrides: Sequence[str], name: str, section: type[Schema]) -> Schema:
    """Reads one table of a TOML and leaves the others alone: all that starting the processes needs.

    Args:
        toml_path: A whole TOML; what is wrong in its other tables is not looked at.
        overrides: As for ``load_config``, of this table only.
        name: The table, e.g. ``parallel``; an absent one has its defaults.
        section: Class that the table is checked with.

    Raises:
        ConfigError: As for ``load_config``.
    """
    path = Path(toml_path)
    fields: dict[str, Any] = {name: (section, ...)}
    schema = create_model(f"Only{section.__name__}", **fields)
    tables, sources = read_tables(path, overrides, schema=schema)
    try:
        return getattr(schema.model_validate({name: tables.get(name, {})}), name)
    except ValidationError as error:
        raise ConfigError(_report(_problems(error, schema, sources, str(path)), path)) from None


def read_tables(
    path: Path, overrides: Sequence[str], *, schema: type[BaseModel] = RunConfig, recipes: Sequence[TaskRecipe] = ()
) -> tuple[Tables, Sources]:
    """The TOML's tables with recipes and overrides applied and paths made absolute, not validated.

    Returns:
        The tables, and for every overridden key where it came from.

    Raises:
        ConfigError: The file or an override cannot be read.
    """
    tables = read_toml(path)
    _resolve_paths(tables, path.parent, schema=schema)
    sources: Sources = {}
    for recipe in recipes:
        sections = copy.deepcopy(dict(recipe.sections))
        _resolve_paths(sections, recipe.path.parent, schema=schema)
        for section, table in sections.items():
            tables[section] = {**tables.get(section, {}), **table}
            sources |= {(section, key): f"{recipe.path}, [{recipe.name}]" for key in table}
    for key_path, text in split_overrides(overrides).items():
        known = _schema_key(key_path)
        value = _value(text, as_text=_wants_text(schema, known))
        if known in _path_keys(schema) and isinstance(value, str):
            value = _absolute(value, Path.cwd())
        if key_path[0] not in tables:
            sources[key_path[:1]] = COMMAND_LINE
        table = tables
        for depth, name in enumerate(key_path[:-1], start=1):
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                where = ".".join(key_path[:depth])
                raise ConfigError(f"{path}: {where} must be a table [{where}], not {table!r}")
        table[key_path[-1]] = value
        sources[key_path] = COMMAND_LINE
    return tables, sources


def _resolve_paths(tables: Tables, folder: Path, *, schema: type[BaseModel]) -> None:
    for key_path in _path_keys(schema):
        found: list[Any] = [tables]
        for name in key_path[:-1]:
            inside = [table for table in found if isinstance(table, dict)]
            found = [value for table in inside for value in (table.values() if name == ANY_NAME else [table.get(name)])]
        for table in found:
            if isinstance(table, dict) and isinstance(table.get(key_path[-1]), str):
                table[key_path[-1]] = _absolute(table[key_path[-1]], folder)


def split_overrides(arguments: Sequence[str]) -> dict[tuple[str, ...], str]:
    """``--section.key value`` and ``--section.key=value`` -> {(section, key): text}; four parts in a table of tables.

    Raises:
        ConfigError: An argument of another form, without a value, or a key given twice.
    """
    found: dict[tuple[str, ...], str] = {}
    problems: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, text = argument.partition("=")
        parts = name[2:].split(".")
        if not name.startswith("--") or len(parts) not in (2, 4) or not all(parts):
            problems.append(f"command line: {argument!r} is not of the form --section.key value")
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                problems.append(f"command line: {name} has no value")
                continue
            text = rest.pop(0)
        key = tuple(parts)
        if key in found:
            problems.append(f"command line: {name} is given twice ({found[key]!r} and {text!r})")
        found[key] = text
    if problems:
        raise ConfigError(_report(problems, Path(COMMAND_LINE)))
    return found


def _value(text: str, *, as_text: bool) -> Any:
    try:
        table = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    if set(table) != {"value"} or (as_text and not isinstance(table["value"], str)):
        return text
    return table["value"]


def _absolute(text: str, base: Path) -> str:
    # An empty text stays what it is: joined, it would silently mean the folder.
    return os.path.normpath(base.absolute() / Path(text).expanduser()) if text else text


def _mentions(annotation: Any, kind: type) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, kind):
        return True
    return any(_mentions(argument, kind) for argument in get_args(annotation))


def _fields(schema: type[BaseModel]) -> dict[tuple[str, ...], FieldInfo]:
    """Every key, as (section, key), and as (section, key, NAME, key) in a table of tables."""
    found: dict[tuple[str, ...], FieldInfo] = {}
    for section, table in schema.model_fields.items():
        if isinstance(table.annotation, type) and issubclass(table.annotation, BaseModel):
            for key, field in table.annotation.model_fields.items():
                found[section, key] = field
                if get_origin(field.annotation) is dict and _mentions(field.annotation, BaseModel):
                    inner = get_args(field.annotation)[1].model_fields
                    found |= {(section, key, ANY_NAME, name): inside for name, inside in inner.items()}
    return found


def _schema_key(key_path: tuple[str, ...]) -> tuple[str, ...]:
    """As ``_fields`` has it."""
    return (*key_path[:2], ANY_NAME, *key_path[3:]) if len(key_path) > 2 else key_path


def _path_keys(schema: type[BaseModel]) -> set[tuple[str, ...]]:
    return {key for key, field in _fields(schema).items() if _mentions(field.annotation, Path)}


def _wants_text(schema: type[BaseModel], known: tuple[str, ...]) -> bool:
    # A run directory named 2024 is a name, not a number.
    field = _fields(schema).get(known)
    annotation = None if field is None else field.annotation
    return any(kind in (annotation, *get_args(annotation)) for kind in (str, Path)) or _mentions(annotation, Path)


def _problems(error: ValidationError, schema: type[BaseModel], sources: Sources, path: str) -> list[str]:
    fields = _fields(schema)
    known = [".".join(key) for key in fields]
    messages: dict[tuple[str, ...], list[str]] = {}
    items = error.errors(include_url=False)
    # Where a value inside a list is wrong, pydantic also says that the list is too short, or is no "auto".
    inside = {item["loc"][:2] for item in items if any(isinstance(part, int) for part in item["loc"])}
    for item in items:
        is_inside = any(isinstance(part, int) for part in item["loc"])
        if not is_inside and item["loc"][:2] in inside and item["type"] in ("too_short", "too_long", "literal_error"):
            continue
        location = tuple(str(part) for part in item["loc"])
        # Behind the key come positions in a list and alternatives of a union.
        depth = 4 if (*location[:2], ANY_NAME) in {key[:3] for key in fields} else 2
        key = tuple(part for part in location[:depth] if part != "[key]")
        name = ".".join(key)
        where = sources.get(key, path)
        if item["type"] == "extra_forbidden":
            text = f"{where}: unknown key {name}{_suggestion(name, known, schema)}"
        elif item["type"] == "missing" and len(location) > depth:  # inside a list
            text = f"{where}: {name} has too few values{_meaning(schema, key)}"
        elif item["type"] == "missing":
            text = f"{where}: {name} is missing{_meaning(schema, key)}"
        elif item["type"] == "model_type":
            text = f"{where}: {name} must be a table [{name}], not {item['input']!r}"
        elif item["type"] == "value_error":
            text = f"{where}: {item['ctx']['error']}"
        else:  # the alternatives of a union come one by one and are joined
            expected = item["msg"].removeprefix("Input should be ")
            if item["type"] in RANGE_ERRORS:
                expected = _range(fields.get(_schema_key(key))) or expected
            elif item["type"] in ("too_short", "too_long"):
                least, most = (item["ctx"].get(name) for name in ("min_length", "max_length"))
                expected = f"at least {least} of them" if most is None else f"at most {most} of them"
            messages.setdefault((*key, f"{where}: {name} = {_shown(item['input'])}"), []).append(expected)
            continue
        messages[(*key, text)] = []
    return [f"{key[-1]}; expected {' or '.join(expected)}" if expected else key[-1] for key, expected in messages.items()]


def _range(field: FieldInfo | None) -> str:
    """``0.1 to 10080``: the whole range of a number, empty where it is not known."""
    marks = [] if field is None else [*field.metadata, *_marks(field.annotation)]
    ends = {name: getattr(mark, name) for mark in marks for name in ("ge", "gt", "le", "lt") if hasattr(mark, name)}
    low = f"{ends['ge']:g}" if "ge" in ends else f"above {ends['gt']:g}" if "gt" in ends else ""
    high = f"{ends['le']:.10g}" if "le" in ends else f"below {ends['lt']:g}" if "lt" in ends else ""
    return (
        f"a number from {low} to {high}".replace("to below", "to less than").replace("from above", "above")
        if low and high
        else ""
    )


def _marks(annotation: Any) -> list[Any]:
    """The bounds in an annotation, inside unions and tuples as well."""
    found = list(getattr(annotation, "__metadata__", ()))
    for mark in tuple(found):
        found += getattr(mark, "metadata", ())
    for argument in get_args(annotation):
        found += _marks(argument)
    return found


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _suggestion(name: str, known: Sequence[str], schema: type[BaseModel]) -> str:
    if "." not in name and (sections := difflib.get_close_matches(name, schema.model_fields, n=1)):
        return f"; did you mean [{sections[0]}]?"
    last = {full.rpartition(".")[2]: full for full in known}
    if near := difflib.get_close_matches(name, known, n=1, cutoff=0.75):
        return f"; did you mean {near[0]}?"
    if near := difflib.get_close_matches(name.rpartition(".")[2], last, n=1, cutoff=0.6):
        return f"; did you mean {last[near[0]]}?"
    section = name.partition(".")[0]
    keys = [full for full in known if full.startswith(section + ".")] or list(schema.model_fields)
    return f"; known are {', '.join(keys)}"


def _meaning(schema: type[BaseModel], key: tuple[str, ...]) -> str:
    field = _fields(schema).get(_schema_key(key))
    return f": {field.description.splitlines()[0]}" if field is not None and field.description else ""


def _report(problems: Sequence[str], path: Path) -> str:
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems in the configuration of {path}:\n" + "\n".join(f"  {p}" for p in problems)
