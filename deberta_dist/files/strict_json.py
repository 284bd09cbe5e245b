"""JSON from a file that may be damaged, edited or hostile: one meaning or an error.

Python's reader takes NaN, the last of two equal keys, ``true`` where a number is meant, any depth and half of a surrogate
pair. Nothing here does. Rooms whose files have an error class of their own make themselves a `StrictJson`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deberta_dist.errors import ConfigError, DataError, DebertaDistError, printable
from deberta_dist.files.foreign import refuse_foreign

MAX_INTEGER = 2**63 - 1
MAX_CONFIGURATION_BYTES = 1 << 20
"""A configuration is small; anything larger is another file given by mistake."""
_MAX_DIGITS = 400
"""Of an integer: what a float has room for."""


class LongInteger(str):
    """An integer of more digits than Python converts, as its digits; no text, although a string."""


def json_integer(digits: str) -> int | LongInteger:
    """An integer of somebody's JSON: for ``parse_int``, where a reader must not fail at a field that it does not read.

    Python refuses to convert more than 4,300 digits (it takes long).
    """
    try:
        return int(digits)
    except ValueError:
        return LongInteger(digits)


def loads(text: bytes | str, *, any_numbers: bool = False, any_text: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        text: UTF-8 where it is bytes.
        any_numbers: Integers of any length are taken, as `LongInteger` where need be, and so are numbers that are infinite as
            a float: for readers that pass over fields.
        any_text: Half surrogates are taken: so are names of files that are not UTF-8 written.

    Raises:
        ValueError: It is no JSON, has a key twice, NaN or Infinity, a number without room, text that cannot be written, or
            is nested too deeply. A `json.JSONDecodeError` where JSON's grammar is broken.
    """
    try:
        value = json.loads(
            text.decode("utf-8") if isinstance(text, bytes) else text,
            object_pairs_hook=_unique,
            parse_constant=_no_number,
            parse_float=float if any_numbers else _finite,
            parse_int=json_integer if any_numbers else _integer,
        )
        if not any_text:
            # Half of a surrogate pair is JSON, and text that nothing can print or write.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def read_configuration(path: Path, *, shown: str, kind: str = "JSON", hint: str = "") -> str:
    """The text of a small file of settings.

    Args:
        shown: Its name where it cannot be read, as "run.deepspeed = PATH".
        kind: What it should be.
        hint: The end of the message where it cannot be read.

    Raises:
        ConfigError: It cannot be read, is too large, another kind of file, or not UTF-8.
    """
    try:
        if path.stat().st_size > MAX_CONFIGURATION_BYTES:
            raise ConfigError(
                f"{path}: {path.stat().st_size} bytes are too many for a configuration (at most {MAX_CONFIGURATION_BYTES})"
            )
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{shown}: cannot be read ({error.strerror}){hint}") from None
    refuse_foreign(content, path, error=ConfigError)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not valid {kind}: not UTF-8; save it as UTF-8") from None


class StrictJson:
    """Checks of a document, each with the same error class. ``where`` is a path inside the document, for messages.

    Args:
        error: What every method raises.
    """

    def __init__(self, error: type[DebertaDistError] = DataError) -> None:
        self._error = error

    def parse(self, text: bytes, *, file: object) -> dict[str, Any]:
        """The object in ``text``, UTF-8; ``file`` is named in messages."""
        try:
            value = loads(text)
        except ValueError as error:
            raise self._error(f"{file} is not valid JSON ({error})") from error
        if not isinstance(value, dict):
            raise self._error(f"{file} holds {type(value).__name__}, not an object")
        return value

    def fields(self, value: Any, *, keys: Sequence[str], where: str) -> dict[str, Any]:
        """``value`` as an object with exactly ``keys``."""
        found = self.mapping(value, where=where)
        if set(found) != set(keys):
            missing, unknown = sorted(set(keys) - set(found)), sorted(set(found) - set(keys))
            raise self._error(f"{where}: missing keys {missing}, unknown keys {unknown[:5]}")
        return found

    def mapping(self, value: Any, *, where: str) -> dict[str, Any]:
        """``value`` as an object with any keys."""
        if not isinstance(value, dict):
            raise self._error(f"{where}: an object is expected, not {type(value).__name__}")
        return value

    def sequence(self, value: Any, *, where: str) -> list[Any]:
        """``value`` as an array."""
        if not isinstance(value, list):
            raise self._error(f"{where}: an array is expected, not {type(value).__name__}")
        return value

    def integer(self, value: Any, *, where: str, minimum: int = 0) -> int:
        """``value`` as a whole number in [minimum, 2^63)."""
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= MAX_INTEGER:
            raise self._error(f"{where}: a whole number from {minimum} on is expected, not {str(value)[:40]}")
        return value

    def string(self, value: Any, *, where: str) -> str:
        """``value`` as text."""
        if not isinstance(value, str):
            raise self._error(f"{where}: text is expected, not {type(value).__name__}")
        return value


def as_read(value: Mapping[str, Any]) -> dict[str, Any]:
    """``value`` as it comes back from JSON (tuples as lists), so that it can be compared with what was read.

    Raises:
        ValueError: NaN or infinity in it.
        TypeError: something JSON cannot say.
    """
    found: dict[str, Any] = json.loads(json.dumps(value, allow_nan=False))
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"key given twice: {', '.join(map(printable, twice))}")
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(text)


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"{text[:12]}... has {len(text)} digits")
    return int(text)
