"""Special ids as published, determinism, and what is refused."""

import io
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from deberta_dist.data.tokenizer import SPECIAL_PIECES, Tokenizer, clean_text, train_tokenizer
from deberta_dist.errors import ConfigError, DataError


def test_special_ids_follow_the_published_model(tokenizer: Tokenizer) -> None:
    assert tokenizer.num_tokens == 1001
    assert tokenizer.special_ids == (0, 1, 2, 3, 1000)
    assert tokenizer.pieces([0, 1, 2, 3, 1000]) == ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]


def test_training_is_deterministic_and_an_identical_file_is_kept(texts: list[str], tmp_path: Path) -> None:
    first, second = tmp_path / "a.model", tmp_path / "b.model"
    for path in (first, second, second):
        train_tokenizer(texts[:4], path, vocab_size=400)
    assert first.read_bytes() == second.read_bytes()
    assert Tokenizer(first).sha256 == Tokenizer(second).sha256
    assert sorted(tmp_path.iterdir()) == [first, second]


def test_a_different_file_is_never_replaced(texts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "spm.model"
    path.write_bytes(b"something else")
    with pytest.raises(DataError, match="exists already"):
        train_tokenizer(texts[:2], path, vocab_size=300)
    assert path.read_bytes() == b"something else"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("given", "vocab_size", "error", "message"),
    [
        (["hello world, hello"], 5000, DataError, r"largest possible is \d+"),
        (["abcdefghijklmnopqrstuvwxyz"], 8, DataError, r"too small.* take \d+"),
        ([], 100, DataError, "no text"),
        (["", "\n \n"], 100, DataError, "no text"),
        (["hello"], 4, ConfigError, "leaves no piece"),
    ],
)
def test_training_refuses(
    given: list[str], vocab_size: int, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        train_tokenizer(given, tmp_path / "spm.model", vocab_size=vocab_size)
    assert list(tmp_path.iterdir()) == []


def test_the_size_named_as_possible_is_possible(texts: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        train_tokenizer(texts[:2], tmp_path / "spm.model", vocab_size=10**6)
    largest = int(str(caught.value).split("largest possible is ")[1].split(";")[0])
    train_tokenizer(texts[:2], tmp_path / "spm.model", vocab_size=largest)
    assert Tokenizer(tmp_path / "spm.model").num_tokens == largest + 1


def test_text_survives_encoding_and_decoding(tokenizer: Tokenizer) -> None:
    text = "The Time Traveller was one of those men who are too clever to be believed"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = [tokenizer.cls_id, *tokenizer.encode("the time"), tokenizer.mask_id, tokenizer.sep_id]
    assert tokenizer.decode(ids) == "[CLS] the time [MASK] [SEP]"


def test_characters_that_are_no_text_count_as_spaces(tokenizer: Tokenizer) -> None:
    assert clean_text("a\0b\ud800c") == "a b c"
    assert tokenizer.encode("time\0machine\udfff") == tokenizer.encode("time machine")


def test_written_out_special_pieces_are_ordinary_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("[CLS] [SEP] [PAD] [MASK]")
    assert not {tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id, tokenizer.mask_id} & set(ids)


def test_word_starts(tokenizer: Tokenizer) -> None:
    starts = tokenizer.is_word_start
    assert starts.dtype == bool and starts.shape == (tokenizer.num_tokens,)
    assert all(starts[list(tokenizer.special_ids)])
    pieces = tokenizer.pieces(range(tokenizer.num_tokens))
    for piece, start in list(zip(pieces, starts, strict=True))[4:-1]:
        assert start == (piece.startswith("\u2581") or (len(piece) == 1 and not piece.isalnum())), piece
    assert starts[pieces.index("-")] and not starts[pieces.index("s")]
    with pytest.raises(ValueError, match="read-only"):
        starts[0] = False


def test_loading_refuses_what_is_no_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing.model cannot be read.*No such file"):
        Tokenizer(tmp_path / "missing.model")
    with pytest.raises(DataError, match="cannot be read"):
        Tokenizer(tmp_path)
    model = tokenizer.path.read_bytes()
    for number, content in enumerate((b"", b"no model at all", model[: len(model) // 2 + 1])):
        path = tmp_path / f"{number}.model"
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"\.model is not a sentencepiece model"):
            Tokenizer(path)


@pytest.mark.parametrize("with_mask_piece", [False, True])
def test_loading_refuses_other_special_ids(texts: list[str], tmp_path: Path, with_mask_piece: bool) -> None:
    model = io.BytesIO()
    published: dict[str, object] = {"user_defined_symbols": "[MASK]"}
    for i, (name, piece) in enumerate(zip(("pad", "bos", "eos", "unk"), SPECIAL_PIECES, strict=True)):
        published |= {f"{name}_id": i, f"{name}_piece": piece}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts[0].split("\n")),
        model_writer=model,
        vocab_size=200,
        minloglevel=2,
        **(published if with_mask_piece else {}),
    )
    (tmp_path / "foreign.model").write_bytes(model.getvalue())
    message = r"foreign.model begins with .* expected \[PAD\] \[CLS\] \[SEP\] \[UNK\]"
    with pytest.raises(DataError, match=message):
        Tokenizer(tmp_path / "foreign.model")


def test_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer) -> None:
    for ids in ([-1], [tokenizer.num_tokens]):
        with pytest.raises(DataError, match="outside the 1001 tokens"):
            tokenizer.decode(ids)


@pytest.mark.parametrize("text", ["the time machine", "it was \0 late", "caf\u00e9 \ud800 au lait", "", "\u201cquoted\u201d"])
def test_ids_as_an_array_are_those_of_the_list(tokenizer: Tokenizer, text: str) -> None:
    array = tokenizer.encode_array(text)
    assert array.dtype == np.int32 and array.tolist() == tokenizer.encode(text)
