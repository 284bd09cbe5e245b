"""Extracts the text field of one JSON record, or says why there is none.

Called by ``documents`` for every line.
"""

import json
import re
from collections.abc import Callable
from typing import Any

from deberta_dist.errors import printable
from deberta_dist.files.strict_json import json_integer

# How a file begins that is one JSON array of objects, or one object over many lines.
WHOLE_ARRAY = re.compile(rb"\[\s*(?:[\[{\]]|\Z)|\[[ \t\r]*\n")
WHOLE_OBJECT = re.compile(rb"\{[ \t\r]*\n")


class _Repeated(dict[str, Any]):
    """An object that has keys more than once."""

    twice: frozenset[str]


def text_of(line: str, *, field: str) -> str:
    """The text in a field of a JSON object.

    Numbers of any length, NaN, half surrogate pairs and repeated keys elsewhere in the record do not matter.

    Args:
        line: one JSON object.
        field: name of the field; "doc.text" is the field "text" of "doc" where there is no field "doc.text".

    Raises:
        ValueError: the line is no JSON object, or has no string in the field, or the field twice.
    """
    try:
        value = any_json(line)
    except ValueError as error:
        raise ValueError(f"not a line of JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object with the field {field!r}")
    text = value.get(field)
    if type(text) is str and line.count(f'"{field}"') == 1:
        return text
    # The last of two equal keys would have been taken, without a word.
    text = _find(any_json(line, hook=_with_repeated_keys), field)
    if type(text) is not str:  # digits of a long integer are no text
        found = printable(", ".join(value) or "none")
        raise ValueError(f"no string in the field {field!r}; fields here: {found}")
    return text


def any_json(text: str, *, hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """A JSON value; integers of more digits than Python converts are ``LongInteger``.

    Args:
        text: one JSON value of any kind.
        hook: makes an object of its pairs; None: a dict.

    Raises:
        ValueError: it is no JSON, or nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=hook)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError:  # of int(): the fast way above has no room for a reader of integers
        return json.loads(text, object_pairs_hook=hook, parse_int=json_integer)


def _with_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    repeated = _Repeated(found)
    names = [name for name, _ in pairs]
    repeated.twice = frozenset(name for name in found if names.count(name) > 1)
    return repeated


def _find(value: Any, field: str) -> Any:
    if not isinstance(value, dict):
        return None
    if field in value:
        return _value(value, field)
    for at in (at for at, character in enumerate(field) if character == "."):
        if field[:at] in value and (found := _find(_value(value, field[:at]), field[at + 1 :])) is not None:
            return found
    return None


def _value(value: dict[str, Any], name: str) -> Any:
    if isinstance(value, _Repeated) and name in value.twice:
        raise ValueError(f"the field {name!r} is there twice")
    return value[name]
