"""Texts as sequences of hashed words, and hashes of their n-grams, vectorised with numpy.

Contamination and near-duplicates compare documents through it, so both see the same words. The hashes are the same in
every process and on every machine whose Python has the same Unicode database.
"""

import functools
import sys
import unicodedata
from dataclasses import dataclass

import numpy as np

from deberta_dist.data.sampler import mix_array

MAX_WORD = 1 << 16  # characters of a word that its hash sees

_SPACE = ord(" ")
_SLOW = np.uint32(sys.maxunicode + 1)  # what no table can fold: it depends on its neighbours, or becomes several
_BASE = 0x9E3779B97F4A7C15
_FIRST_WHOLE = 0x3041
_WHOLE_NAMES = ("CJK UNIFIED", "CJK COMPATIBILITY IDEOGRAPH", "HIRAGANA LETTER", "KATAKANA LETTER", "BOPOMOFO")


@dataclass(frozen=True, kw_only=True, eq=False)
class Words:
    """The words of a text.

    Attributes:
        codes: code points of the folded text, separators as spaces; uint8 or uint32 [num_characters].
        starts, ends: where each word lies in ``codes``, int64 [num_words].
        hashes: uint64 [num_words]; equal words have equal hashes.
    """

    codes: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    hashes: np.ndarray

    def slice(self, first: int, last: int) -> list[str]:
        """Words first to last - 1, folded."""
        if first >= last:
            return []
        codes = self.codes[self.starts[first] : self.ends[last - 1]]
        text = _decode(codes)
        begin = self.starts[first]
        return [text[i:j] for i, j in zip(self.starts[first:last] - begin, self.ends[first:last] - begin, strict=True)]


def code_points(text: str) -> np.ndarray:
    """The characters of a text as numbers, lone surrogates among them; uint32 [num_characters]."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def fold(text: str) -> str:
    """The text without differences of case, width and composition: NFKC, casefold, NFKC."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def split_words(text: str) -> Words:
    """The words of a text: runs of letters, digits and marks after ``fold``; all else separates.

    A Chinese character, a kana and a bopomofo letter is a word of its own. Other scripts without spaces (Thai, Lao,
    Khmer, Burmese) give one long word for every run between spaces or punctuation.

    Hash of a word, c_i the code point at place i of it, T a table of random numbers, B odd:
    mix(sum_i T[c_i] B^i) modulo 2**64, over the first ``MAX_WORD`` characters.
    """
    codes = _fold_codes(text)
    is_word = np.zeros(len(codes) + 2, dtype=bool)
    np.not_equal(codes, _SPACE, out=is_word[1:-1])
    if codes.itemsize > 1 and codes.max(initial=0) >= _FIRST_WHOLE:
        is_whole = np.zeros(len(codes) + 2, dtype=bool)
        np.take(_tables().is_whole, codes, out=is_whole[1:-1])
        is_cut = (is_word[1:] != is_word[:-1]) | is_whole[1:] | is_whole[:-1]
        starts, ends = np.flatnonzero(is_cut & is_word[1:]), np.flatnonzero(is_cut & is_word[:-1])
    else:
        edges = np.flatnonzero(is_word[1:] != is_word[:-1])
        starts, ends = edges[::2], edges[1::2]
    return Words(codes=codes, starts=starts, ends=ends, hashes=_hash_words(codes, starts, ends))


def ngram_hashes(word_hashes: np.ndarray, *, n: int) -> np.ndarray:
    """Hash of every n words in a row: mix(sum_j h_j B^(n-1-j)) modulo 2**64, h_j the words' hashes.

    Args:
        word_hashes: uint64 [num_words]
        n: words of one n-gram, at least 1.

    Returns:
        uint64 [max(num_words - n + 1, 0)]
    """
    assert n >= 1
    return mix_array(_ngram_sums(word_hashes, n))


def _ngram_sums(hashes: np.ndarray, n: int) -> np.ndarray:
    """By halves: S_2k[i] = S_k[i] B^k + S_k[i + k]."""
    if len(hashes) < n:
        return np.empty(0, dtype=np.uint64)
    if n == 1:
        return hashes
    if n % 2:
        return _ngram_sums(hashes, n - 1)[:-1] * np.uint64(_BASE) + hashes[n - 1 :]
    half = _ngram_sums(hashes, n // 2)
    return half[: -(n // 2)] * np.uint64(pow(_BASE, n // 2, 1 << 64)) + half[n // 2 :]


def _hash_words(codes: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Hashes of the words, by differences of running sums over pieces of at most ``MAX_WORD`` characters."""
    tables = _tables()
    sums = np.empty(len(starts), dtype=np.uint64)
    ends = np.minimum(ends, starts + MAX_WORD)
    first = 0
    while first < len(starts):
        begin = starts[first]
        last = int(np.searchsorted(ends, begin + MAX_WORD, side="right"))
        length = int(ends[last - 1] - begin)
        running = np.zeros(length + 1, dtype=np.uint64)
        values = tables.numbers[codes[begin : begin + length]]
        values *= tables.powers[:length]
        np.cumsum(values, out=running[1:])
        begins = starts[first:last] - begin
        sums[first:last] = (running[ends[first:last] - begin] - running[begins]) * tables.inverse_powers[begins]
        first = last
    return mix_array(sums)


def _fold_codes(text: str) -> np.ndarray:
    """Code points of ``fold(text)``, every separator as a space; uint8 where all are below 256, else uint32."""
    tables = _tables()
    if text.isascii():
        return np.frombuffer(text.encode().translate(tables.ascii), dtype=np.uint8)
    codes = tables.folded[code_points(text)]
    highest = codes.max()
    if highest == _SLOW:
        codes = code_points(fold(text))
        codes = np.where(tables.is_word[codes], codes, np.uint32(_SPACE))
        highest = codes.max(initial=0)
    return codes.astype(np.uint8) if highest < 256 else codes


def _decode(codes: np.ndarray) -> str:
    return codes.tobytes().decode("latin-1" if codes.itemsize == 1 else "utf-32-le", "surrogatepass")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Tables:
    """What is looked up for a code point, or for a place in a piece of text.

    Attributes:
        ascii: bytes.translate table of the ASCII part of ``folded``.
        folded: folded code point, space for a separator, ``_SLOW``; uint32 [num_code_points].
        is_word: belongs to a word; bool [num_code_points].
        is_whole: is a word of its own; bool [num_code_points].
        numbers: random; uint64 [num_code_points].
        powers, inverse_powers: B^i and B^-i modulo 2**64; uint64 [MAX_WORD + 1].
    """

    ascii: bytes
    folded: np.ndarray
    is_word: np.ndarray
    is_whole: np.ndarray
    numbers: np.ndarray
    powers: np.ndarray
    inverse_powers: np.ndarray


@functools.cache
def _tables() -> _Tables:
    num_codes = sys.maxunicode + 1
    is_word, is_whole = np.zeros(num_codes, dtype=bool), np.zeros(num_codes, dtype=bool)
    categories = list(map(unicodedata.category, map(chr, range(num_codes))))
    assigned = [code for code, category in enumerate(categories) if category not in ("Cn", "Co", "Cs")]
    joins: set[str] = set()  # can melt into the character before
    for code in assigned:
        is_word[code] = chr(code).isalnum() or categories[code][0] == "M"
        if code >= _FIRST_WHOLE:
            is_whole[code] = is_word[code] and unicodedata.name(chr(code), "").startswith(_WHOLE_NAMES)
        joins.update(unicodedata.normalize("NFD", chr(code))[1:])
    folded = np.full(num_codes, _SPACE, dtype=np.uint32)
    for code in assigned:
        composed = unicodedata.normalize("NFKC", chr(code))
        result = fold(chr(code))
        # Only then the folded text is that of its characters, one after the other.
        alone = not any(unicodedata.combining(c) or c in joins for c in composed + composed.casefold() + result)
        if not alone or (len(result) != 1 and any(is_word[ord(c)] for c in result)):
            folded[code] = _SLOW
        elif len(result) == 1 and is_word[ord(result)]:
            folded[code] = ord(result)
    powers = np.ones((2, MAX_WORD + 1), dtype=np.uint64)
    powers[:, 1:] = np.array([[_BASE], [pow(_BASE, -1, 1 << 64)]], dtype=np.uint64)
    powers = np.multiply.accumulate(powers, axis=1)
    return _Tables(
        ascii=bytes(folded[:128].astype(np.uint8)) + bytes(128),
        folded=folded,
        is_word=is_word,
        is_whole=is_whole,
        numbers=mix_array(np.arange(1, num_codes + 1, dtype=np.uint64) * np.uint64(_BASE)),
        powers=powers[0],
        inverse_powers=powers[1],
    )
