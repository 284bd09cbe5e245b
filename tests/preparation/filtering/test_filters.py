"""Filters against a count of one character at a time."""

import argparse
import random
from dataclasses import fields

import pytest

from deberta_dist.errors import ConfigError
from deberta_dist.preparation.filtering.filters import Filters, add_arguments, from_arguments

# Letters, digits, marks, symbols and white space of several scripts, one with a code point above 0xFFFF each.
ALPHABET = "ab Z019 .,-\n\t\r\x1c\x85\u00a0\u2003\u3000éßЖд中国かな한글अिθ٣५²½Ⅳ…“”€😀𝔘𝟙\u0301\u200b_\x00"


def naive_first_failed(filters: Filters, text: str) -> str | None:
    """The rules as their docstring states them."""
    lines = [line.strip() for line in text.split("\n")]
    repeated = sum(len(line) for number, line in enumerate(lines) if line in lines[:number])
    words: list[str] = [""]
    for character in text:
        words = [*words, ""] if character.isspace() else [*words[:-1], words[-1] + character]
    lengths = [len(word) for word in words if word]
    symbols = sum(not (character.isalnum() or character.isspace()) for character in text)
    digits = sum(character.isdigit() for character in text)
    values = {
        "max_characters": len(text),
        "max_symbol_share": symbols / max(len(text), 1),
        "max_digit_share": digits / max(len(text), 1),
        "max_duplicate_line_share": repeated / max(sum(map(len, lines)), 1),
        "max_mean_word_characters": sum(lengths) / max(len(lengths), 1),
        "max_word_characters": max(lengths, default=0),
    }
    for rule in fields(filters):
        bound = getattr(filters, rule.name)
        if bound is None:
            continue
        failed = len(text) < bound if rule.name == "min_characters" else values[rule.name] > bound
        if failed:
            return rule.name
    return None


def test_agrees_with_one_character_at_a_time() -> None:
    generator = random.Random(1)
    everything = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    seen: dict[str | None, int] = {}
    for number in range(1500):
        source = everything if number % 3 == 0 else ALPHABET
        text = "".join(generator.choices(source, k=generator.randrange(60)))
        text = "\n".join(generator.choices([text, text[:7], "x y", ""], k=generator.randrange(1, 5)))
        bounds: dict[str, float | int] = {
            "min_characters": generator.randrange(1, 20),
            "max_characters": generator.randrange(20, 200),
            "max_symbol_share": generator.random(),
            "max_digit_share": generator.random() / 4,
            "max_duplicate_line_share": generator.random(),
            "max_mean_word_characters": generator.random() * 20 + 0.1,
            "max_word_characters": generator.randrange(1, 30),
        }
        chosen = {name: value for name, value in bounds.items() if generator.random() < 0.5}
        filters = Filters(**chosen)
        expected = naive_first_failed(filters, text)
        assert filters.first_failed(text) == expected, (filters, text)
        seen[expected] = seen.get(expected, 0) + 1
    assert set(seen) == {None, *bounds}
    assert min(seen.values()) >= 10


@pytest.mark.parametrize(
    ("text", "bounds", "expected"),
    [
        ("", {"max_symbol_share": 0.0, "max_digit_share": 0.0, "max_duplicate_line_share": 0.0}, None),
        ("ab", {"min_characters": 2, "max_characters": 2}, None),
        ("中国", {"max_characters": 1}, "max_characters"),
        ("a. b", {"max_symbol_share": 0.25}, None),
        ("a. b", {"max_symbol_share": 0.24}, "max_symbol_share"),
        ("नमस्ते", {"max_symbol_share": 0.3}, "max_symbol_share"),  # Vowel signs are no letters for str.isalnum.
        ("2 of 3 times", {"max_digit_share": 0.1}, "max_digit_share"),
        ("one\n one \ntwo", {"max_duplicate_line_share": 0.33}, "max_duplicate_line_share"),
        ("one\n\n\n\n", {"max_duplicate_line_share": 0.0}, None),
        ("a bbb", {"max_mean_word_characters": 2}, None),
        ("a bbbb", {"max_mean_word_characters": 2, "max_word_characters": 3}, "max_mean_word_characters"),
        ("a bbbb", {"max_word_characters": 3}, "max_word_characters"),
    ],
)
def test_bounds(text: str, bounds: dict[str, float | int], expected: str | None) -> None:
    assert Filters().first_failed(text) is None
    assert Filters(**bounds).first_failed(text) == expected


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"min_characters": 0}, "min_characters = 0 is not an integer of at least 1: change --min-characters"),
        ({"max_word_characters": 2.5}, "max_word_characters = 2.5 is not an integer"),
        ({"max_symbol_share": 1.5}, "max_symbol_share = 1.5 is not a share from 0 to 1: change --max-symbol-share"),
        ({"max_digit_share": float("nan")}, "max_digit_share = nan is not a share"),
        ({"max_mean_word_characters": float("inf")}, "max_mean_word_characters = inf is not a number above 0"),
        ({"min_characters": 9, "max_characters": 8}, "min_characters = 9 is above max_characters = 8"),
    ],
)
def test_what_cannot_be_is_refused(bounds: dict[str, float | int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Filters(**bounds)


def test_options() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert from_arguments(parser.parse_args([])) == Filters()
    given = "--min-characters 20 --max-symbol-share 0.3 --max-word-characters 1000"
    expected = Filters(min_characters=20, max_symbol_share=0.3, max_word_characters=1000)
    assert from_arguments(parser.parse_args(given.split())) == expected
    everything = [word for rule in fields(Filters) for word in ("--" + rule.name.replace("_", "-"), "1")]
    assert None not in vars(from_arguments(parser.parse_args(everything))).values()
