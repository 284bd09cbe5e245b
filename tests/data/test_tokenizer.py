"""Special ids as published, determinism, and what is refused."""

import io
import random
import string
import tomllib
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from packaging.requirements import Requirement

from deberta_dist.data.tokenizer import (
    SPECIAL_PIECES,
    TESTED_SENTENCEPIECE,
    Tokenizer,
    clean_text,
    train_tokenizer,
    version_warning,
)
from deberta_dist.data.vocabulary_options import NORMALIZATION_RULES, VocabularyOptions, read_symbols
from deberta_dist.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]


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
    assert b"seeds" not in first.read_bytes()


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
        (["hello"], 1_000_001, ConfigError, "vocab_size = 1000001, expected at most 1,000,000"),
    ],
)
def test_training_refuses(given: list[str], vocab_size: int, error: type[Exception], message: str, tmp_path: Path) -> None:
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


def invented(letters: str) -> list[str]:
    """60 lines of 400 invented words: the same ones, letter for letter, whatever the letters."""
    draw = random.Random(1)
    words = ["".join(letters[min(int(draw.expovariate(0.08)), 45)] for _ in range(draw.randint(3, 9))) for _ in range(400)]
    return [" ".join(draw.choices(words, k=60)) for _ in range(60)]


@pytest.mark.parametrize(
    "first", [0x0E01, 0x0905, 0x0410, 0xAC00, 0x4E00], ids=["Thai", "Devanagari", "Cyrillic", "Hangul", "Han"]
)
def test_letters_that_share_their_first_bytes_are_learned_like_latin(first: int, tmp_path: Path) -> None:
    """sentencepiece 0.2.3's own search finds a twentieth of the pieces of several letters."""
    letters = [c for c in map(chr, range(first, first + 200)) if c.isalpha() and unicodedata.normalize("NFKC", c) == c]
    long = []
    for name, alphabet in (("latin", string.ascii_letters[:46]), ("other", "".join(letters[:46]))):
        assert len(alphabet) == 46
        train_tokenizer(invented(alphabet), tmp_path / name, vocab_size=420, options=VocabularyOptions(character_coverage=1))
        long.append(sum(len(piece.strip("\u2581")) > 1 for piece in Tokenizer(tmp_path / name).pieces(range(4, 420))))
    latin, other = long
    assert latin > 350 and other >= 0.8 * latin


@pytest.mark.parametrize("run", ["-" * 60_000, "".join(random.Random(0).choices(string.printable[:62] + "+/", k=40_000))])
def test_a_long_run_is_cut_and_spoils_nothing(run: str, texts: list[str], tmp_path: Path) -> None:
    told = train_tokenizer([*texts[:5], run], tmp_path / "spm.model", vocab_size=700)
    assert (told.num_cut_runs, told.num_cut_characters) == (1, len(run))
    train_tokenizer(texts[:5], tmp_path / "without.model", vocab_size=700)
    with_run, without = (set(Tokenizer(tmp_path / name).pieces(range(700))) for name in ("spm.model", "without.model"))
    assert len(with_run & without) > 450


def test_text_without_spaces_is_learned_though_it_is_cut(texts: list[str], tmp_path: Path) -> None:
    """As well as the same text in lines."""
    solid = ["".join(text.split())[:3000] for text in texts]
    lines = [text[at : at + 300] for text in solid for at in range(0, len(text), 300)]
    sizes = []
    for name, given in (("cut", solid), ("lines", lines)):
        told = train_tokenizer(given, tmp_path / name, vocab_size=600)
        assert (told.num_cut_runs > 0) == (name == "cut")
        sizes.append(sum(len(Tokenizer(tmp_path / name).encode(text)) for text in solid))
    assert sizes[0] <= 1.02 * sizes[1]


def test_an_error_of_the_text_comes_through_as_it_is(tmp_path: Path) -> None:
    def broken() -> Iterator[str]:
        yield "some text"
        raise DataError("a.txt:1: not UTF-8")

    with pytest.raises(DataError, match="^a.txt:1: not UTF-8$"):
        train_tokenizer(broken(), tmp_path / "spm.model", vocab_size=20)
    assert list(tmp_path.iterdir()) == []


def test_bytes_in_the_place_of_unknown_characters(texts: list[str], tmp_path: Path) -> None:
    options = VocabularyOptions(byte_fallback=True)
    train_tokenizer(texts, tmp_path / "spm.model", vocab_size=700, options=options)
    tokenizer = Tokenizer(tmp_path / "spm.model")
    text = "time \u2603\U0001f600 x"
    ids = tokenizer.encode(text)
    assert len(tokenizer.byte_ids) == 256 and tokenizer.unk_id not in ids and tokenizer.decode(ids) == text
    surfaces = tokenizer.surfaces(text)
    assert len(surfaces) == len(ids) and "".join(surfaces) == "\u2581time\u2581\u2603\U0001f600\u2581x"
    assert sum(i in tokenizer.byte_ids for i in ids) == 3 + 4


def test_user_defined_symbols_are_one_piece_each(texts: list[str], tmp_path: Path) -> None:
    symbols = ("<URL>", "a,b", '"q"')
    options = VocabularyOptions(user_defined_symbols=symbols, normalization_rule="nmt_nfkc_cf")
    train_tokenizer(texts, tmp_path / "spm.model", vocab_size=500, options=options)
    tokenizer = Tokenizer(tmp_path / "spm.model")
    assert tokenizer.pieces([4, 5, 6]) == list(symbols)
    pieces = tokenizer.pieces(tokenizer.encode('See<URL>The a,b "q"'))
    assert set(symbols) < set(pieces) and "the" in "".join(pieces) and "The" not in "".join(pieces)


@pytest.mark.parametrize("rule", NORMALIZATION_RULES)
def test_no_rule_makes_line_ends_unknown(rule: str, texts: list[str], tmp_path: Path) -> None:
    options = VocabularyOptions(normalization_rule=rule)
    train_tokenizer(texts[:6], tmp_path / "spm.model", vocab_size=400, options=options)
    tokenizer = Tokenizer(tmp_path / "spm.model")
    assert tokenizer.unk_id not in tokenizer.encode("the time\nthe\r\n\tmachine")
    is_lower, is_narrow = rule.endswith("_cf"), rule != "identity"
    assert ("THE" not in tokenizer.decode(tokenizer.encode("THE TIME"))) == is_lower
    assert (tokenizer.encode("\uff54\uff48\uff45") == tokenizer.encode("the")) == is_narrow


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"character_coverage": 0.5}, r"character_coverage = 0.5, expected 0.98 to 1"),
        ({"character_coverage": float("nan")}, "character_coverage = nan"),
        ({"normalization_rule": "nfd"}, "normalization_rule = 'nfd', expected one of nmt_nfkc, "),
        ({"max_run_characters": 0}, "max_run_characters = 0"),
        ({"user_defined_symbols": ("[MASK]",)}, r"\[MASK\]: it is a piece of every vocabulary"),
        ({"user_defined_symbols": ("a b",)}, "'a b': it is empty or holds white space"),
        ({"user_defined_symbols": ("x", "x")}, "x is given twice"),
        ({"user_defined_symbols": ("<0x0A>",), "byte_fallback": True}, "<0x0A>: byte_fallback"),
        ({"byte_fallback": True}, "vocab_size = 100 leaves no piece .* and 256 symbols and bytes"),
    ],
)
def test_options_that_cannot_be(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        train_tokenizer(["some text"], tmp_path / "m", vocab_size=100, options=VocabularyOptions(**given))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xef\xbb\xbf<a>\r\n\n<b>\n", ("<a>", "<b>")),
        (b"<a>\n<b>\n<a>", r"symbols.txt:3: <a> is in line 1 already"),
        (b"<a>\n<b c>\n", r"symbols.txt:2: '<b c>' holds white space"),
        (b"<a>\ncaf\xe9", r"symbols.txt:2: not UTF-8"),
        (b"\n \n", "holds none"),
        (None, "symbols.txt cannot be read .No such file"),
    ],
)
def test_a_file_of_symbols(content: bytes | None, expected: tuple[str, ...] | str, tmp_path: Path) -> None:
    path = tmp_path / "symbols.txt"
    if content is not None:
        path.write_bytes(content)
    if isinstance(expected, tuple):
        assert read_symbols(path) == expected
        return
    with pytest.raises(DataError, match=expected):
        read_symbols(path)


def test_other_versions_of_the_library_are_told() -> None:
    assert f"sentencepiece=={TESTED_SENTENCEPIECE}\n" in (ROOT / "launchers" / "requirements.txt").read_text()
    assert version_warning(TESTED_SENTENCEPIECE) == ""
    assert "0.2.3 is installed (of Thai" in version_warning("0.2.3") and "sentencepiece==0.2.2" in version_warning("0.2.3")
    assert "Thai" not in version_warning("0.9.0") and "0.9.0 is installed" in version_warning("0.9.0")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    allowed = next(r.specifier for r in map(Requirement, project["dependencies"]) if r.name == "sentencepiece")
    assert [v for v in ("0.2.0", "0.2.1", "0.2.2", "0.2.3", "0.2.4", "0.3.0") if v in allowed] == [TESTED_SENTENCEPIECE]
