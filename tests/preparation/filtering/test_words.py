"""Words and their hashes against Unicode's own definitions, one character at a time."""

import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from deberta_dist.preparation.filtering.words import MAX_WORD, fold, ngram_hashes, split_words

WHOLE = ("CJK UNIFIED", "CJK COMPATIBILITY IDEOGRAPH", "HIRAGANA LETTER", "KATAKANA LETTER", "BOPOMOFO")


def naive_words(text: str) -> list[str]:
    words = [""]
    for character in fold(text):
        part = character.isalnum() or unicodedata.category(character).startswith("M")
        if part and unicodedata.name(character, "").startswith(WHOLE):
            words += [character, ""]
        elif part:
            words[-1] += character
        else:
            words.append("")
    return [word for word in words if word]


def words_of(text: str) -> list[str]:
    words = split_words(text)
    return words.slice(0, len(words.hashes))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" ... \n", []),
        ("Don't STOP-me_now 3.5", ["don", "t", "stop", "me", "now", "3", "5"]),
        ("ＡＢＣ“ﬁnd” Straße\u00a0CAFE\u0301…x²", ["abc", "find", "strasse", "café", "x2"]),
        ("他是12岁ok 東京タワーへ", ["他", "是", "12", "岁", "ok", "東", "京", "タ", "ワ", "ー", "へ"]),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),
        ("대한민국 만세", ["대한민국", "만세"]),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words_of(text) == expected


def test_agrees_with_one_character_at_a_time() -> None:
    generator = random.Random(1)
    everything = [chr(code) for code in range(0x110000)]  # lone surrogates too
    assigned = [c for c in everything if unicodedata.category(c) not in ("Cn", "Co", "Cs")]
    common = "abcXYZ 09.,-'éÉßİſΣςЖ…½²ﬁ\u00a0\u0301\u0323\u1161\u11a8가각中かガｶﾞ々ーन्\u200dไทย😀𝔘"
    num_whole = 0
    for number in range(3000):
        source = (everything, assigned, common, common)[number % 4]
        text = "".join(generator.choices(source, k=generator.randrange(40)))
        expected = naive_words(text)
        assert words_of(text) == expected, ascii(text)
        num_whole += any(unicodedata.name(word[0], "").startswith(WHOLE) for word in expected)
    assert num_whole > 500


def test_hash_is_that_of_the_word() -> None:
    texts = ["The cat saw the other Cat", "«THE» 中 ё cat", "x" * 300 + " the " + "y" * 70_000, "the 中" * 60_000]
    seen: dict[str, int] = {}
    for text in texts:
        words = split_words(text)
        for word, value in zip(words.slice(0, len(words.hashes)), words.hashes.tolist(), strict=True):
            assert seen.setdefault(word, value) == value
    assert len(set(seen.values())) == len(seen) > 6
    head = "z" * MAX_WORD
    assert split_words(f"a {head}1").hashes[1] == split_words(f"{head}2 a").hashes[0]


def test_ngram_hashes() -> None:
    letters = random.Random(2).choices("abc", k=400)
    hashes = split_words(" ".join(letters)).hashes
    for n in (1, 2, 3, 5, 8, 13):
        values = ngram_hashes(hashes, n=n).tolist()
        ngrams = [tuple(letters[i : i + n]) for i in range(len(letters) - n + 1)]
        assert len(values) == len(ngrams)
        assert len(set(zip(ngrams, values, strict=True))) == len(set(ngrams)) == len(set(values))
    assert len(ngram_hashes(hashes[:4], n=5)) == 0
    assert np.array_equal(ngram_hashes(hashes[7:12], n=5), ngram_hashes(hashes, n=5)[7:8])


def test_same_in_every_process() -> None:
    code = "from deberta_dist.preparation.filtering.words import split_words; print(split_words('One two 三').hashes.tolist())"
    root = Path(__file__).resolve().parents[3]
    said = subprocess.check_output([sys.executable, "-c", code], cwd=root, text=True, timeout=60).strip()
    assert said == str(split_words("one TWO 三").hashes.tolist())
    # A change of these numbers makes the fingerprints and signatures of earlier preparations worthless.
    assert said == "[7181795740765017090, 18179665511011359729, 4137263819216622117]"
