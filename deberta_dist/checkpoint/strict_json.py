"""JSON from a file that may be damaged or hostile: one meaning or an error.

Python's reader takes NaN, the last of two equal keys, ``true`` where a number is meant and any depth. The
functions here do not. ``where`` in all of them is a path inside the document, for messages.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from deberta_dist.checkpoint.errors import CheckpointError

MAX_INTEGER = 2**63 - 1


def parse(text: bytes, *, file: object) -> dict[str, Any]:
    """The object in ``text``.

    Args:
        text: UTF-8.
        file: Named in messages.

    Raises:
        CheckpointError: not an object of strict JSON.
    """
    try:
        value = json.loads(
            text.decode("utf-8"),
            parse_constant=_no_constant,
            parse_float=_finite,
            object_pairs_hook=_unique,
        )
        # Half of a surrogate pair is JSON, and text that nothing can print or write.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds {type(value).__name__}, not an object")
    return value


def fields(value: Any, *, keys: Sequence[str], where: str) -> dict[str, Any]:
    """``value`` as an object with exactly ``keys``."""
    found = mapping(value, where=where)
    if set(found) != set(keys):
        missing, unknown = sorted(set(keys) - set(found)), sorted(set(found) - set(keys))
        raise CheckpointError(f"{where}: missing keys {missing}, unknown keys {unknown[:5]}")
    return found


def mapping(value: Any, *, where: str) -> dict[str, Any]:
    """``value`` as an object with any keys."""
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: an object is expected, not {type(value).__name__}")
    return value


def sequence(value: Any, *, where: str) -> list[Any]:
    """``value`` as an array."""
    if not isinstance(value, list):
        raise CheckpointError(f"{where}: an array is expected, not {type(value).__name__}")
    return value


def integer(value: Any, *, where: str, minimum: int = 0) -> int:
    """``value`` as a whole number in [minimum, 2^63)."""
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= MAX_INTEGER:
        raise CheckpointError(f"{where}: a whole number from {minimum} on is expected, not {str(value)[:40]}")
    return value


def string(value: Any, *, where: str) -> str:
    """``value`` as text."""
    if not isinstance(value, str):
        raise CheckpointError(f"{where}: text is expected, not {type(value).__name__}")
    return value


def plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """``value`` as it comes back from JSON (tuples as lists), so that it can be compared with what was read.

    Raises:
        ValueError: NaN or infinity in it.
        TypeError: something JSON cannot say.
    """
    return json.loads(json.dumps(value, allow_nan=False))


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not a number")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is too large")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a key twice")
    return found
