"""Parses a SentencePiece model file without the protobuf package.

The sentencepiece library gives pieces and scores, not the compiled normalisation rules, which other tokenizer
libraries need to split text alike. The few fields needed are read from the wire format here.

Source: google/sentencepiece src/sentencepiece_model.proto.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from deberta_dist.errors import DataError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
UNIGRAM = 1
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_SEEDS_FILE = 54


@dataclass(frozen=True)
class VocabularyPiece:
    """One piece: its text, its log probability, and its kind: NORMAL, UNKNOWN, CONTROL, USER_DEFINED or BYTE."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True, kw_only=True)
class SentencePieceModel:
    """The parts of a model file that decide how text is split.

    Attributes:
        pieces: In order of their ids.
        model_type: UNIGRAM or another.
        byte_fallback: Unknown characters become bytes.
        suffix_whitespace: Spaces go to the word before.
        charsmap: Compiled normalisation rules; empty for none.
        add_dummy_prefix: A text begins with a space.
        remove_extra_whitespaces: Runs of spaces are one, and none are left at the ends.
    """

    pieces: tuple[VocabularyPiece, ...]
    model_type: int
    byte_fallback: bool
    suffix_whitespace: bool
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


def parse_model(content: bytes) -> SentencePieceModel:
    """Reads the bytes of an ``spm.model``.

    Raises:
        DataError: they are cut short or not of this format.
    """
    try:
        pieces: list[VocabularyPiece] = []
        trainer: dict[int, int | bytes] = {}
        normalizer: dict[int, int | bytes] = {}
        for number, value in _fields(content):
            if number == _PIECES:
                piece = dict(_fields(_bytes(value)))
                score = struct.unpack("<f", _bytes(piece[2]))[0] if 2 in piece else 0.0
                pieces.append(VocabularyPiece(_bytes(piece[1]).decode("utf-8"), score, _integer(piece.get(3, NORMAL))))
            elif number == _TRAINER:
                trainer = dict(_fields(_bytes(value)))
            elif number == _NORMALIZER:
                normalizer = dict(_fields(_bytes(value)))
        model_type, charsmap = _integer(trainer.get(3, UNIGRAM)), _bytes(normalizer.get(2, b""))
    except (IndexError, KeyError, struct.error, ValueError) as error:
        raise DataError("the SentencePiece model is damaged") from error
    return SentencePieceModel(
        pieces=tuple(pieces),
        model_type=model_type,
        byte_fallback=bool(trainer.get(35, False)),
        suffix_whitespace=bool(trainer.get(24, False)),
        charsmap=charsmap,
        add_dummy_prefix=bool(normalizer.get(3, True)),
        remove_extra_whitespaces=bool(normalizer.get(4, True)),
    )


def without_seeds_file(content: bytes) -> bytes:
    """The bytes of a model file without the name of the file of candidates that the trainer was given.

    That is a temporary file: with its name the same text would give another model every time.
    """
    result = bytearray()
    for start, stop, number, value in _spans(content):
        if number != _TRAINER:
            result += content[start:stop]
            continue
        trainer = _bytes(value)
        kept = b"".join(trainer[a:b] for a, b, inner, _ in _spans(trainer) if inner != _SEEDS_FILE)
        result += bytes([_TRAINER << 3 | 2]) + _as_varint(len(kept)) + kept
    return bytes(result)


def _as_varint(number: int) -> bytes:
    result = bytearray()
    while number > 0x7F:
        result.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*result, number])


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("an integer where bytes are expected")
    return value


def _integer(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise ValueError("bytes where an integer is expected")
    return value


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of every field of one message: integers, or bytes for everything else."""
    for _, _, number, value in _spans(content):
        yield number, value


def _spans(content: bytes) -> Iterator[tuple[int, int, int, int | bytes]]:
    """(first byte, last byte + 1, number, value) of every field of one message."""
    at = 0
    while at < len(content):
        start = at
        key, at = _varint(content, at)
        if key & 7 == 0:
            value, at = _varint(content, at)
            yield start, at, key >> 3, value
            continue
        if key & 7 == 2:
            length, at = _varint(content, at)
        else:
            length = {1: 8, 5: 4}[key & 7]
        if at + length > len(content):
            raise ValueError("cut short")
        at += length
        yield start, at, key >> 3, content[at - length : at]


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
