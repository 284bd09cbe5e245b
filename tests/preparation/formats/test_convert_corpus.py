"""Token files to Megatron's datasets and back: nothing lost, nothing replaced, the wrong thing refused."""

import struct
from pathlib import Path

import numpy as np
import pytest

from deberta_dist.data.corpus_index import write_index
from deberta_dist.data.token_file import TokenFile
from deberta_dist.data.token_writer import TokenFileWriter
from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.errors import ConfigError, DataError
from deberta_dist.preparation.formats import convert
from deberta_dist.preparation.formats.convert import convert_corpus
from deberta_dist.preparation.formats.megatron import MegatronFile
from tests.preparation.pipeline.small import documents_in
from tests.preparation.test_tools import assert_one_line_error, run

TOOL = "convert_corpus.py"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def lay_out(prefix: Path, *, dtype: str = "<i4") -> None:
    """Documents of two sequences, of none, of end-of-document alone and of one sequence; 2 ends each."""
    ids = np.array([5, 6, 7, 2, 2, 8, 2], dtype)
    code = {"<i4": 4, "<u2": 8}[dtype]
    lengths, pointers, indices = [2, 2, 1, 2], np.array([0, 2, 4, 5]) * ids.itemsize, [0, 2, 2, 3, 4]
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ4i4q5q", 1, code, 4, 5, *lengths, *pointers, *indices)
    prefix.with_name(prefix.name + ".idx").write_bytes(index)
    prefix.with_name(prefix.name + ".bin").write_bytes(ids.tobytes())


@pytest.mark.parametrize("block", [1, 5, 1 << 18])
@pytest.mark.parametrize("eod", [None, 2])
def test_there_and_back_is_bit_exact(
    token_file: TokenFile, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eod: int | None,
    block: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(convert, "_BLOCK", block)
    there = convert_corpus(token_file.path, tmp_path / "m.v1", tokenizer=tokenizer, append_eod=eod)
    num_eod = 0 if eod is None else token_file.num_documents
    assert there.paths == (tmp_path / "m.v1.idx", tmp_path / "m.v1.bin")
    assert (there.num_documents, there.num_eod) == (token_file.num_documents, num_eod)
    assert there.num_tokens == token_file.num_tokens + num_eod
    back = convert_corpus(tmp_path / "m.v1.bin", tmp_path / "b.tokens", tokenizer=tokenizer, strip_eod=eod)
    file = TokenFile(tmp_path / "b.tokens")
    file.verify()
    assert file.checksum == token_file.checksum  # of ids and document offsets
    assert file.path.read_bytes()[4096:] == token_file.path.read_bytes()[4096:]
    assert (file.tokenizer_sha256, file.vocab_size, file.source) == (tokenizer.sha256, tokenizer.num_tokens, "m.v1.bin")
    assert (back.num_documents, back.num_tokens) == (token_file.num_documents, token_file.num_tokens)
    assert (back.num_eod, back.num_empty_documents) == (num_eod, 0)
    convert_corpus(tmp_path / "b.tokens", tmp_path / "again.idx", tokenizer=tokenizer, append_eod=eod)
    for suffix in ("idx", "bin"):
        assert (tmp_path / f"again.{suffix}").read_bytes() == (tmp_path / f"m.v1.{suffix}").read_bytes()


def test_a_directory_becomes_one_dataset(token_file: TokenFile, tokenizer: Tokenizer, tmp_path: Path) -> None:
    offsets = token_file.document_offsets
    for name, first, stop in (("a", 0, 5), ("b", 5, token_file.num_documents)):
        with TokenFileWriter(
            tmp_path / "many" / f"{name}.tokens", tokenizer_sha256=tokenizer.sha256, vocab_size=tokenizer.num_tokens
        ) as writer:
            writer.add_documents(token_file.ids[offsets[first] : offsets[stop]], np.diff(offsets[first : stop + 1]))
    write_index(tmp_path / "many", ["a.tokens", "b.tokens"])
    for source, target in ((token_file.path, "one"), (tmp_path / "many", "all")):
        convert_corpus(source, tmp_path / target, tokenizer=tokenizer, append_eod=2)
    for suffix in ("idx", "bin"):
        assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"all.{suffix}").read_bytes()
    with pytest.raises(ConfigError, match="or X.tokens or a directory of them and the prefix"):
        convert_corpus(tmp_path / "many", tmp_path / "b.tokens", tokenizer=tokenizer)


@pytest.mark.parametrize("dtype", ["<i4", "<u2"])
@pytest.mark.parametrize(
    ("strip_eod", "expected", "num_empty", "num_eod"),
    [(None, [[5, 6, 7, 2], [2], [8, 2]], 1, 0), (2, [[5, 6, 7], [8]], 2, 3), (7, [[5, 6, 7, 2], [2], [8, 2]], 1, 0)],
)
def test_sequences_are_joined_and_empty_documents_counted(
    tokenizer: Tokenizer, tmp_path: Path, dtype: str, strip_eod: int | None, expected: list[list[int]],
    num_empty: int, num_eod: int,
) -> None:  # fmt: skip
    lay_out(tmp_path / "m", dtype=dtype)
    report = convert_corpus(tmp_path / "m.idx", tmp_path / "a.tokens", tokenizer=tokenizer, strip_eod=strip_eod)
    assert documents_in(tmp_path / "a.tokens") == expected
    assert (report.num_documents, report.num_empty_documents, report.num_eod) == (len(expected), num_empty, num_eod)


def test_what_is_refused_leaves_nothing(
    token_file: TokenFile, tokenizer: Tokenizer, other_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    lay_out(tmp_path / "m")
    lay_out(tmp_path / "large")
    (tmp_path / "large.bin").write_bytes(np.array([5, 6, 7, 2, 2, tokenizer.num_tokens, 2], "<i4").tobytes())
    lay_out(tmp_path / "empty")
    (tmp_path / "empty.idx").write_bytes(b"MMIDIDX\0\0" + struct.pack("<QBQQ2i2q3q", 1, 4, 2, 3, 1, 1, 0, 4, 0, 1, 2))
    (tmp_path / "empty.bin").write_bytes(np.array([2, 2], "<i4").tobytes())
    content = bytearray(token_file.path.read_bytes())
    content[4096] ^= 1
    (tmp_path / "flipped.tokens").write_bytes(content)
    before = contents(tmp_path)
    m, tokens, new = tmp_path / "m.idx", token_file.path, tmp_path / "new.tokens"
    cases = [
        ((tmp_path / "large.idx", new), {}, DataError, "large.bin: id 1001 of document 3 .byte 20. is outside"),
        ((tmp_path / "empty.idx", new), {"strip_eod": 2}, DataError, "new.tokens is not written: there are no documents"),
        ((tmp_path / "nowhere.idx", new), {}, DataError, "nowhere.idx cannot be read"),
        ((tokens, tmp_path / "new"), {"tokenizer": other_tokenizer}, DataError, "was made with the tokenizer"),
        ((tmp_path / "flipped.tokens", tmp_path / "new"), {}, DataError, "flipped.tokens is damaged: content has SHA"),
        ((m, new), {"append_eod": 2}, ConfigError, "--append-eod is for writing"),
        ((m, new), {"strip_eod": -1}, ConfigError, "--strip-eod -1"),
        ((tokens, tmp_path / "new"), {"strip_eod": 2}, ConfigError, "--strip-eod is for reading"),
        ((tokens, tmp_path / "new"), {"append_eod": 1001}, ConfigError, "--append-eod 1001 is outside the 1001 tokens"),
        ((tokens, tmp_path / "new"), {"append_eod": -1}, ConfigError, "--append-eod -1"),
        ((tokens, new), {}, ConfigError, "expected X.idx or X.bin and Y.tokens"),
        ((m, tmp_path / "new"), {}, ConfigError, "expected X.idx"),
        ((tmp_path / "m", new), {}, ConfigError, "expected X.idx"),
    ]
    for (source, target), options, error, message in cases:
        with pytest.raises(error, match=message):
            convert_corpus(source, target, **{"tokenizer": tokenizer, **options})
        assert contents(tmp_path) == before, message


def test_nothing_is_replaced(token_file: TokenFile, tokenizer: Tokenizer, tmp_path: Path) -> None:
    lay_out(tmp_path / "m")
    (tmp_path / "mine.tokens").write_bytes(b"mine")
    (tmp_path / "mine.bin").write_bytes(b"mine")
    # found before the source is read, which takes long where it is large
    (tmp_path / "damaged.idx").write_bytes(b"MMIDIDX")
    before = contents(tmp_path)
    for name in ("m.idx", "damaged.idx"):
        with pytest.raises(DataError, match="mine.tokens exists already"):
            convert_corpus(tmp_path / name, tmp_path / "mine.tokens", tokenizer=tokenizer)
    with pytest.raises(DataError, match="mine.bin exists already"):
        convert_corpus(token_file.path, tmp_path / "mine", tokenizer=tokenizer)
    assert contents(tmp_path) == before


def test_from_the_command_line(token_file: TokenFile, tokenizer: Tokenizer, tmp_path: Path) -> None:
    to = (TOOL, token_file.path, "out/m", "--tokenizer", tokenizer.path)
    made = run(*to, "--append-eod", 2, cwd=tmp_path)
    assert made.returncode == 0 and made.stderr == "", made.stderr
    assert "out/m.idx and out/m.bin: " in made.stdout and "17 documents, id 2 appended at the end of 17" in made.stdout
    assert sorted(contents(tmp_path / "out")) == ["m.bin", "m.idx"]
    assert MegatronFile(tmp_path / "out" / "m").num_documents == 17
    assert_one_line_error(run(*to, cwd=tmp_path), code=65, words="m.idx exists already")
    back = (TOOL, "out/m.idx", "out/b.tokens", "--tokenizer", tokenizer.path)
    made = run(*back, "--strip-eod", 2, cwd=tmp_path)
    assert made.returncode == 0 and "17 documents, id 2 dropped at the end of 17" in made.stdout, made.stderr
    assert TokenFile(tmp_path / "out" / "b.tokens").checksum == token_file.checksum
    assert_one_line_error(run(*back, cwd=tmp_path), code=65, words="b.tokens exists already")
    assert_one_line_error(run(*to, "--strip-eod", 2, cwd=tmp_path), code=2, words="--strip-eod is for reading")
    assert sorted(contents(tmp_path / "out")) == ["b.tokens", "m.bin", "m.idx"]
