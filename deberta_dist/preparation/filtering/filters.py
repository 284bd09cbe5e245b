"""Length and quality filters that work for any language.

They count characters and know no vocabulary. Letters, digits and white space are those of ``str.isalnum``,
``str.isdigit`` and ``str.isspace``. All are off by default. Corpus preparation asks for every document.
"""

import argparse
import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from deberta_dist.errors import ConfigError
from deberta_dist.preparation.filtering.words import code_points

_ALNUM, _DIGIT, _SPACE = 1, 2, 4
_ASCII = "".join(map(chr, range(128)))
_ASCII_BYTES = _ASCII.encode()
_ASCII_ALNUM = "".join(filter(str.isalnum, _ASCII)).encode()
_ASCII_DIGIT = "".join(filter(str.isdigit, _ASCII)).encode()
_ASCII_SPACE = "".join(filter(str.isspace, _ASCII)).encode()
_SPACE_IS_ONE = bytes(byte in _ASCII_SPACE for byte in range(256))


def _rule(kind: type[int] | type[float], text: str) -> Any:
    """A field that is off by default; ``text`` says what the number is, in the help of its option."""
    return field(default=None, metadata={"kind": kind, "help": text})


@dataclass(frozen=True, kw_only=True)
class Filters:
    """The rules; None switches one off. A document that meets a bound exactly is kept.

    Shares are of all characters of the document, white space among them; those of lines are of the characters of
    lines without the white space around them. A word is a run between white space. Where nothing can be counted (an
    empty document), a share or a length is 0.

    Attributes:
        min_characters, max_characters: length of a document, in characters.
        max_symbol_share: share of characters that are neither letters, digits nor white space, 0 to 1.
        max_digit_share: share of digits, 0 to 1.
        max_duplicate_line_share: share of characters in lines that repeat an earlier line, 0 to 1.
        max_mean_word_characters: mean length of the words, in characters.
        max_word_characters: length of the longest word, in characters.

    Raises:
        ConfigError: a number is out of its range, or min_characters is above max_characters.
    """

    min_characters: int | None = _rule(int, "shortest document, in characters")
    max_characters: int | None = _rule(int, "longest document, in characters")
    max_symbol_share: float | None = _rule(
        float, "largest share of characters that are neither letters, digits nor white space, 0 to 1"
    )
    max_digit_share: float | None = _rule(float, "largest share of digits among the characters, 0 to 1")
    max_duplicate_line_share: float | None = _rule(
        float, "largest share of characters in lines that repeat an earlier line of the document, 0 to 1"
    )
    max_mean_word_characters: float | None = _rule(float, "largest mean length of the words, in characters")
    max_word_characters: int | None = _rule(int, "largest length of any word, in characters")

    def __post_init__(self) -> None:
        for rule in fields(self):
            value = getattr(self, rule.name)
            if value is None:
                continue
            if rule.metadata["kind"] is int:
                fits, expected = type(value) is int and value >= 1, "an integer of at least 1"
            elif rule.name.endswith("_share"):
                fits, expected = type(value) in (int, float) and 0 <= value <= 1, "a share from 0 to 1"
            else:
                fits = type(value) in (int, float) and value > 0 and math.isfinite(value)
                expected = "a number above 0"
            if not fits:
                raise ConfigError(f"{rule.name} = {value!r} is not {expected}: change {_option(rule.name)}")
        low, high = self.min_characters, self.max_characters
        if low is not None and high is not None and low > high:
            raise ConfigError(
                f"min_characters = {low} is above max_characters = {high}, no document would be kept: change "
                f"{_option('min_characters')} or {_option('max_characters')}"
            )

    def first_failed(self, text: str) -> str | None:
        """Name of the first rule, in the order of the fields, that a document fails; None if it is kept."""
        length = len(text)
        if self.min_characters is not None and length < self.min_characters:
            return "min_characters"
        if self.max_characters is not None and length > self.max_characters:
            return "max_characters"
        if self.max_symbol_share is not None or self.max_digit_share is not None:
            num_alnum, num_digits, num_spaces = _count_kinds(text)
            if _is_above(length - num_alnum - num_spaces, self.max_symbol_share, of=length):
                return "max_symbol_share"
            if _is_above(num_digits, self.max_digit_share, of=length):
                return "max_digit_share"
        if self.max_duplicate_line_share is not None:
            lines = list(map(str.strip, text.split("\n")))
            total = sum(map(len, lines))
            # Whatever is in a line more than once is missing from the set of lines.
            if _is_above(total - sum(map(len, set(lines))), self.max_duplicate_line_share, of=total):
                return "max_duplicate_line_share"
        if self.max_mean_word_characters is not None or self.max_word_characters is not None:
            lengths = _word_lengths(text)
            if _is_above(int(lengths.sum()), self.max_mean_word_characters, of=len(lengths)):
                return "max_mean_word_characters"
            if self.max_word_characters is not None and lengths.max(initial=0) > self.max_word_characters:
                return "max_word_characters"
        return None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds one option for every rule: --min-characters and so on."""
    group = parser.add_argument_group("filters", "documents that fail one stay out of the corpus (default: none)")
    for rule in fields(Filters):
        kind: Callable[[str], int | float] = rule.metadata["kind"]
        group.add_argument(_option(rule.name), type=kind, metavar="N", help=rule.metadata["help"])


def from_arguments(arguments: argparse.Namespace) -> Filters:
    """The filters that the options of ``add_arguments`` ask for.

    Raises:
        ConfigError: as ``Filters``.
    """
    return Filters(**{rule.name: getattr(arguments, rule.name) for rule in fields(Filters)})


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _is_above(part: int, bound: float | None, *, of: int) -> bool:
    """Whether part / of is above the bound, if there is one."""
    return bound is not None and of > 0 and part / of > bound


def _count_kinds(text: str) -> tuple[int, int, int]:
    """How many characters are letters or digits, digits, white space."""
    raw = text.encode("utf-8", "surrogatepass")
    num_alnum, num_digits, num_spaces = (
        len(raw) - len(raw.translate(None, delete)) for delete in (_ASCII_ALNUM, _ASCII_DIGIT, _ASCII_SPACE)
    )
    if not text.isascii():
        rest = raw.translate(None, _ASCII_BYTES).decode("utf-8", "surrogatepass")
        kinds = np.bincount(_kinds()[code_points(rest)], minlength=8)
        num_alnum += int(kinds[_ALNUM] + kinds[_ALNUM | _DIGIT])
        num_digits += int(kinds[_ALNUM | _DIGIT])
        num_spaces += int(kinds[_SPACE])
    return num_alnum, num_digits, num_spaces


def _word_lengths(text: str) -> np.ndarray:
    """Characters of every word, int64 [num_words]: faster than to make the words."""
    text = f" {text} "
    if text.isascii():
        is_space = np.frombuffer(text.encode().translate(_SPACE_IS_ONE), dtype=bool)
    else:
        is_space = _kinds()[code_points(text)] == _SPACE
    lengths = np.diff(np.flatnonzero(is_space)) - 1
    return lengths[lengths > 0]


@functools.cache
def _kinds() -> np.ndarray:
    """Kind of every code point; a digit is a letter or digit as well."""
    characters = list(map(chr, range(sys.maxunicode + 1)))
    kinds = np.fromiter(map(str.isalnum, characters), np.uint8, len(characters)) * np.uint8(_ALNUM)
    kinds |= np.fromiter(map(str.isdigit, characters), np.uint8, len(characters)) * np.uint8(_DIGIT)
    kinds |= np.fromiter(map(str.isspace, characters), np.uint8, len(characters)) * np.uint8(_SPACE)
    return kinds
