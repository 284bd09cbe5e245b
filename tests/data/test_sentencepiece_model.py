"""Reading the bytes of a SentencePiece model without its library."""

import pytest

from deberta_dist.data.sentencepiece_model import BYTE, NORMAL, UNIGRAM, parse_model
from deberta_dist.errors import DataError

_VARINT, _BYTES = 0, 2


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return bytes([number << 3 | _VARINT, value])
    return bytes([number << 3 | _BYTES, len(value)]) + value


def test_fields_that_are_left_out_have_the_formats_defaults():
    content = _field(1, _field(1, b"a")) + _field(1, _field(1, b"<0x41>") + _field(3, BYTE))
    model = parse_model(content)
    assert [(piece.text, piece.score, piece.kind) for piece in model.pieces] == [("a", 0.0, NORMAL), ("<0x41>", 0.0, BYTE)]
    assert (model.model_type, model.charsmap) == (UNIGRAM, b"")


@pytest.mark.parametrize(
    "content",
    [
        _field(1, 5),  # a piece that is a number
        _field(1, _field(1, 5)),  # a piece whose text is a number
        _field(1, _field(1, b"a") + _field(3, b"kind")),  # whose kind is none
        _field(2, _field(3, b"unigram")),  # a type of model that is no number
        _field(3, _field(2, 7)),  # rules that are a number
        _field(1, _field(1, b"abc"))[:-1],  # cut short
    ],
)
def test_a_field_of_another_kind_is_refused_and_not_handed_on(content):
    with pytest.raises(DataError, match="the SentencePiece model is damaged"):
        parse_model(content)
