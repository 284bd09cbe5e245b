"""Round trip, and a clear refusal for every kind of damage."""

import errno
import gc
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from deberta_dist.data.token_file import TokenFile
from deberta_dist.data.token_writer import TokenFileWriter
from deberta_dist.errors import DataError

DOCUMENTS = [[5, 6, 7], [8], list(range(4, 900)), [999, 0]]


def write(path: Path, documents: list[list[int]] = DOCUMENTS, *, vocab_size: int = 1000) -> Path:
    with TokenFileWriter(path, tokenizer_sha256="ab" * 32, vocab_size=vocab_size, source="test") as writer:
        for document in documents:
            writer.add_document(document)
    return path


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1000, "<u2"), (65536, "<u2"), (65537, "<u4"), (128001, "<u4")])
def test_round_trip(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    documents = [*DOCUMENTS, [vocab_size - 1]]
    file = TokenFile(write(tmp_path / "a.tokens", documents, vocab_size=vocab_size))
    assert isinstance(file.ids, np.memmap) and file.ids.dtype == np.dtype(dtype)
    assert file.num_documents == 5 and file.num_tokens == sum(map(len, documents))
    assert (file.tokenizer_sha256, file.vocab_size, file.source) == ("ab" * 32, vocab_size, "test")
    offsets = file.document_offsets
    assert [file.ids[a:b].tolist() for a, b in zip(offsets[:-1], offsets[1:], strict=True)] == documents
    with pytest.raises(ValueError, match="read-only"):
        file.ids[0] = 1
    file.verify()
    assert [p.name for p in tmp_path.iterdir()] == ["a.tokens"]


@pytest.mark.parametrize("vocab_size", [1000, 70_000])
def test_read_gives_any_range(tmp_path: Path, vocab_size: int) -> None:
    file = TokenFile(write(tmp_path / "a.tokens", vocab_size=vocab_size))
    for start, stop in ((0, file.num_tokens), (3, 3), (1, 800), (file.num_tokens - 1, file.num_tokens)):
        found = file.read(start, stop)
        assert found.dtype == file.ids.dtype and np.array_equal(found, file.ids[start:stop])


def test_read_puts_short_reads_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = TokenFile(write(tmp_path / "a.tokens"))
    whole = os.pread
    monkeypatch.setattr(os, "pread", lambda file, count, offset: whole(file, min(count, 7), offset))
    assert np.array_equal(file.read(2, 60), file.ids[2:60])


def test_read_of_a_file_cut_short_meanwhile_is_refused(tmp_path: Path) -> None:
    file = TokenFile(write(tmp_path / "a.tokens"))
    os.truncate(file.path, 4096 + 20)
    assert file.read(0, 10).tolist() == [5, 6, 7, 8, 4, 5, 6, 7, 8, 9]
    with pytest.raises(DataError, match=r"a\.tokens has become shorter"):
        file.read(0, 11)


def test_a_token_file_gives_its_descriptor_back(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tokens")
    gc.collect()
    before = os.listdir("/proc/self/fd")
    for _ in range(20):
        TokenFile(path).read(0, 1)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_the_same_documents_give_the_same_bytes(tmp_path: Path) -> None:
    assert write(tmp_path / "a.tokens").read_bytes() == write(tmp_path / "b.tokens").read_bytes()


def test_an_existing_file_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.tokens"
    path.write_bytes(b"mine")
    with pytest.raises(DataError, match="exists already"):
        write(path)
    assert path.read_bytes() == b"mine" and list(tmp_path.iterdir()) == [path]


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.tokens"
    with pytest.raises(DataError, match="exists already"):
        with TokenFileWriter(path, tokenizer_sha256="", vocab_size=10) as writer:
            writer.add_document([1])
            path.write_bytes(b"mine")
    assert path.read_bytes() == b"mine" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("ids", [[1, 1000], [-1]])
def test_ids_outside_the_vocabulary_leave_no_file(tmp_path: Path, ids: list[int]) -> None:
    with pytest.raises(DataError, match=rf"id {ids[-1]} of document 1 .* 1000 tokens"):
        write(tmp_path / "a.tokens", [[1], ids])
    assert list(tmp_path.iterdir()) == []


def test_an_error_or_no_document_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="elsewhere"):
        with TokenFileWriter(tmp_path / "a.tokens", tokenizer_sha256="", vocab_size=10) as writer:
            writer.add_document([1])
            raise RuntimeError("elsewhere")
    with pytest.raises(DataError, match="no document"):
        write(tmp_path / "a.tokens", [])
    assert list(tmp_path.iterdir()) == []


def test_truncation_is_refused_wherever_it_cuts(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.tokens").read_bytes()
    path = tmp_path / "cut.tokens"
    ends = [len(whole) - 40, len(whole) - 8, len(whole) - 1]
    for size in (0, 4, 8, 12, 20, 100, 4095, 4096, 4097, 5000, *ends):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"cut\.tokens (is empty|is truncated|is not a token file)"):
            TokenFile(path)


def test_every_changed_byte_of_the_header_is_noticed(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.tokens").read_bytes()
    length = struct.unpack_from("<I", whole, 12)[0]
    path = tmp_path / "flipped.tokens"
    for place in range(20 + length):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        with pytest.raises(DataError, match=r"flipped\.tokens"):
            TokenFile(path)


def test_changed_content_is_found_by_verify(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.tokens").read_bytes()
    path = tmp_path / "flipped.tokens"
    for place in (4096, 5000, len(whole) - 12):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        file = TokenFile(path)
        with pytest.raises(DataError, match=r"flipped\.tokens is damaged"):
            file.verify()


def test_other_refusals(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.tokens").read_bytes()
    cases = {
        "text": (b"Once upon a time", "is not a token file.*prepare_corpus"),
        "longer": (whole + b"\0", "is damaged: .* bytes, expected"),
        "newer": (whole[:8] + struct.pack("<I", 2) + whole[12:], "format version 2, this program reads 1"),
        "span": (whole[:-8] + struct.pack("<q", 7), "do not span"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            TokenFile(tmp_path / name)
    with pytest.raises(DataError, match="missing.tokens cannot be read.*prepare_corpus"):
        TokenFile(tmp_path / "missing.tokens")
    with pytest.raises(DataError, match="cannot be read"):
        TokenFile(tmp_path)


def test_an_output_that_cannot_be_made_or_finished_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="cannot be written"):
        write(tmp_path / "file" / "a.tokens")
    with pytest.raises(DataError, match=r"a.tokens is not written \(No space left on device\)"):
        with TokenFileWriter(tmp_path / "a.tokens", tokenizer_sha256="", vocab_size=10):
            raise OSError(errno.ENOSPC, "No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_ids_beyond_the_vocabulary_in_a_header_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.tokens")
    header = TokenFile(path)._read_header()
    monkeypatch.setattr(TokenFile, "_read_header", lambda self: header | {"max_token_id": 1000})
    with pytest.raises(DataError, match="holds ids up to 1000 .* vocabulary has 1000"):
        TokenFile(path)


def test_documents_added_together_are_those_added_one_by_one(tmp_path: Path) -> None:
    documents = [[1, 2, 3], [4], [5, 6]]
    options = {"tokenizer_sha256": "0" * 64, "vocab_size": 100}
    with TokenFileWriter(tmp_path / "one.tokens", **options) as writer:
        for document in documents:
            writer.add_document(document)
    with TokenFileWriter(tmp_path / "all.tokens", **options) as writer:
        writer.add_documents(np.empty(0, np.int32), np.empty(0, np.uint32))
        writer.add_documents(np.array([1, 2, 3, 4], np.int32), np.array([3, 1], np.uint32))
        writer.add_documents(np.array([5, 6], np.uint32), np.array([2]))
    assert (tmp_path / "all.tokens").read_bytes() == (tmp_path / "one.tokens").read_bytes()
    with (
        pytest.raises(DataError, match="id 100 of document 2 is outside"),
        TokenFileWriter(tmp_path / "bad.tokens", **options) as writer,
    ):
        writer.add_document([7])
        writer.add_documents(np.array([1, 2, 100], np.int32), np.array([2, 1]))
    assert not (tmp_path / "bad.tokens").exists()
