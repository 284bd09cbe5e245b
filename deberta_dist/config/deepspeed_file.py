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

from deberta_dist.config.section import AUTO
from deberta_dist.errors import ConfigError, printable
from deberta_dist.files.foreign import refuse_foreign

MAX_BYTES = 1 << 20
MAX_DEPTH = 64
FEW = 12
_LONGEST_NUMBER = 400  # digits: what a float has room for
_STRING = r'"(?:[^"\\]|\\.)*"'
# Outside of strings: what is often taken for JSON -> what to do.
_NOT_JSON = {
    r"//|/\*|#": "JSON has no comments: take them out",
    r",\s*[}\]]": "no comma stands before } or ]",
    r"\b(?:True|False|None)\b": "JSON writes true, false and null",
    r"'": 'JSON has " around texts',
}


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ConfigError: It cannot be read, is no JSON object, has a key twice, or a number that is not finite.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"key given twice: {', '.join(twice)}")
        return dict(pairs)

    def no_number(text: str) -> float:
        raise ValueError(f"{text} is no number of JSON")

    def finite(text: str) -> float:
        number = float(text)
        return number if abs(number) != float("inf") else no_number(text)

    def whole(text: str) -> int:
        if len(text) > _LONGEST_NUMBER:
            raise ValueError(f"{text[:12]}... has {len(text)} digits")
        return int(text)

    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path}: {path.stat().st_size} bytes is no configuration (at most {MAX_BYTES})")
        content = path.read_bytes()
        refuse_foreign(content, path, error=ConfigError)
        text = content.decode("utf-8-sig")
        ds = json.loads(text, object_pairs_hook=unique, parse_constant=no_number, parse_float=finite, parse_int=whole)
    except OSError as error:
        raise ConfigError(f"run.deepspeed = {path}: cannot be read ({error.strerror})") from None
    except ConfigError:
        raise
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: no text in UTF-8; save it as such") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}{_hint(text)}") from None
    except (ValueError, RecursionError) as error:
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
        key: Dotted.
        known: Dotted keys of the same table.
        elsewhere: Dotted keys of other tables, which count where the last name is right.
    """
    names = {other.rpartition(".")[2]: other for other in known}
    name = key.rpartition(".")[2].lower()
    if not name or not name[0].isalpha():
        return "take it out: a comment is a key like any other to DeepSpeed"
    if near := difflib.get_close_matches(name, names, n=1, cutoff=0.7):
        return f"did you mean {names[near[0]]}?"
    if places := [other for other in elsewhere if other.rpartition(".")[2] == name]:
        return f"did you mean {' or '.join(places)}?"
    if near := [other for other in names if other.startswith(name)]:
        return f"did you mean {' or '.join(names[other] for other in near)}?"
    if near := difflib.get_close_matches(name, names, n=1, cutoff=0.5):
        return f"did you mean {names[near[0]]}?"
    if len(names) <= FEW:
        return f"known are {', '.join(names)}"
    return f"the nearest is {names[difflib.get_close_matches(name, names, n=1, cutoff=0)[0]]}; correct it or take it out"


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
