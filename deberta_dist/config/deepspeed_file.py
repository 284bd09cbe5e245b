"""Reading the DeepSpeed JSON: text -> dictionary without ``null`` and without ``"auto"``, and what was left out.

Used by ``deepspeed_json.py``. ``null`` means that the key is absent. ``"auto"`` means DeepSpeed's own default: DeepSpeed
itself drops the word without a message in some places and stops with a traceback in others.
"""

import difflib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from deberta_dist.errors import ConfigError, printable
from deberta_dist.files.strict_json import loads, read_configuration
from deberta_dist.values import AUTO

MAX_DEPTH = 64
FEW = 12
_STRING = r'"(?:[^"\\]|\\.)*"'
# Outside of strings: what is often taken for JSON -> what to do.
_NOT_JSON = {
    r"//|/\*|#": "JSON has no comments: remove them",
    r",\s*[}\]]": "no comma stands before } or ]",
    r"\b(?:True|False|None)\b": "JSON writes true, false and null",
    r"'": 'JSON has " around texts',
}


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ConfigError: It cannot be read, is no JSON object, has a key twice, or a number that is not finite.
    """

    text = read_configuration(path, shown=f"run.deepspeed = {path}")
    try:
        ds = loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}{_hint(text)}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(ds, dict):
        raise ConfigError(f"{path}: expected an object {{...}}, not {shown(ds)}")
    if _depth(ds) > MAX_DEPTH:
        raise ConfigError(f"{path}: not valid JSON: nested more than {MAX_DEPTH} deep")
    return ds


def _hint(text: str) -> str:
    """What the writer of something that is no JSON may have meant, as the end of a message."""
    if not text.strip():
        return "; the file is empty"
    if not text.lstrip().startswith("{"):
        return "; a DeepSpeed configuration is one JSON object {...}"
    outside = re.sub(_STRING, '""', text)
    found = [hint for pattern, hint in _NOT_JSON.items() if re.search(pattern, outside)]
    return "".join(f"; {hint}" for hint in found)


def take_out_defaults(ds: dict[str, Any]) -> dict[str, str]:
    """Removes every key that is ``null`` or ``"auto"``, at any depth.

    Returns:
        What was removed: dotted key -> ``null`` or ``"auto"`` as JSON has it.
    """
    found = {}
    for name, value in list(_entries(ds)):
        if value is None or value == AUTO:
            table = ds
            for part in name[:-1]:
                table = table[part]
            del table[name[-1]]
            found[".".join(name)] = json.dumps(value)
    return found


def nearest(key: str, known: Iterable[str], elsewhere: Iterable[str] = ()) -> str:
    """What an unknown key may have meant, as the end of a message.

    Args:
        key: The unknown key, with dots between the tables it lies in.
        known: Dotted keys of the same table.
        elsewhere: Dotted keys of other tables, which count where the last name is right.
    """
    names = {other.rpartition(".")[2]: other for other in known}
    name = key.rpartition(".")[2].lower()
    if not name or not name[0].isalpha():
        return "remove it: to DeepSpeed a comment is a key like any other"
    if near := difflib.get_close_matches(name, names, n=1, cutoff=0.7):
        return f"did you mean {names[near[0]]}?"
    if homes := [other for other in elsewhere if other.rpartition(".")[2] == name]:
        return f"did you mean {' or '.join(homes)}?"
    if near := [other for other in names if other.startswith(name)]:
        return f"did you mean {' or '.join(names[other] for other in near)}?"
    if near := difflib.get_close_matches(name, names, n=1, cutoff=0.5):
        return f"did you mean {names[near[0]]}?"
    if len(names) <= FEW:
        return f"known are {', '.join(names)}"
    return f"the nearest is {names[difflib.get_close_matches(name, names, n=1, cutoff=0)[0]]}; correct or remove it"


def shown_key(key: str) -> str:
    """A key that the file has, fit for a message."""
    text = printable(key)
    return (text if len(text) <= 80 else f"{text[:77]}...") or '""'


def shown(value: Any) -> str:
    """A value as JSON has it, short enough for a message."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _entries(table: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in table.items():
        yield (*above, key), value
        if isinstance(value, dict):
            yield from _entries(value, (*above, key))


def _depth(value: Any) -> int:
    deepest, level = 0, [value]
    while level:
        deepest += 1
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return deepest
