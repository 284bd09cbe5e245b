"""Megatron's datasets: read from files laid out by hand, written to the same bytes, every fault refused."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from deberta_dist.errors import DataError
from deberta_dist.preparation.formats import megatron, megatron_writer
from deberta_dist.preparation.formats.megatron import MegatronFile
from deberta_dist.preparation.formats.megatron_writer import MegatronWriter

# 3 sequences of 2, 1 and 3 ids in 2 documents, uint16. Offsets: lengths 34, pointers 46, document indices 70.
INDEX = bytes.fromhex(
    "4d4d494449445800 00"  # M M I D I D X 0 0
    "0100000000000000"  # version 1
    "08"  # uint16
    "0300000000000000"  # sequences
    "0300000000000000"  # document indices
    "02000000 01000000 03000000"
    "0000000000000000 0400000000000000 0600000000000000"
    "0000000000000000 0200000000000000 0300000000000000"
)
BIN = bytes.fromhex("0500 0600 e703 0400 0000 0200")
DOCUMENTS = [[5, 6, 999], [4, 0, 2]]
# The same sequences as fairseq files them: no number of document indices, and none of these.
FAIRSEQ = INDEX[:26] + INDEX[34:70]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"


def lay_out(folder: Path, index: bytes = INDEX, data: bytes = BIN) -> Path:
    """The two files; returns their prefix, which has a dot."""
    (folder / "v1.text.idx").write_bytes(index)
    (folder / "v1.text.bin").write_bytes(data)
    return folder / "v1.text"


def patched(place: int, value: bytes) -> bytes:
    return INDEX[:place] + value + INDEX[place + len(value) :]


def documents(prefix: Path, *, vocab_size: int = 1000, strip_eod: int | None = None) -> list[list[int]]:
    return [ids.tolist() for ids in MegatronFile(prefix).documents(vocab_size=vocab_size, strip_eod=strip_eod)]


@pytest.fixture(params=[1, 2, 1 << 18])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Index entries handled at a time."""
    monkeypatch.setattr(megatron, "_BLOCK", request.param)
    monkeypatch.setattr(megatron_writer, "_BLOCK", request.param)
    return request.param


@pytest.mark.usefixtures("block")
def test_a_dataset_laid_out_by_hand(tmp_path: Path) -> None:
    assert len(INDEX) == 94
    file = MegatronFile(lay_out(tmp_path))
    assert (file.num_sequences, file.num_documents, file.num_tokens) == (3, 2, 6)
    assert isinstance(file.ids, np.memmap) and file.ids.dtype == np.dtype("<u2")
    with pytest.raises(ValueError, match="read-only"):
        file.ids[0] = 1
    assert documents(tmp_path / "v1.text") == DOCUMENTS
    assert documents(lay_out(tmp_path, INDEX + bytes(3))) == DOCUMENTS  # with modes, all of them text


@pytest.mark.parametrize(("code", "dtype"), [(1, "u1"), (2, "i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2")])
def test_every_integer_type(tmp_path: Path, code: int, dtype: str) -> None:
    ids = np.array([5, 6, 99, 4, 0, 2], dtype)
    pointers = np.array([0, 2, 3], "<i8") * ids.itemsize
    index = INDEX[:17] + bytes([code]) + INDEX[18:46] + pointers.tobytes() + INDEX[70:]
    assert documents(lay_out(tmp_path, index, ids.tobytes())) == [[5, 6, 99], [4, 0, 2]]


def test_empty_documents_and_empty_sequences(tmp_path: Path) -> None:
    # sequences of 2, 0 and 4 ids; documents: none, the first, the empty one, none, the last, none
    index = INDEX[:26] + struct.pack("<Q3i3q7q", 7, 2, 0, 4, 0, 4, 4, 0, 0, 1, 2, 2, 3, 3)
    assert documents(lay_out(tmp_path, index)) == [[], [5, 6], [], [], [999, 4, 0, 2], []]
    assert documents(tmp_path / "v1.text", strip_eod=2) == [[], [5, 6], [], [], [999, 4, 0], []]


def test_the_end_of_a_document_is_dropped_once_and_only_there(tmp_path: Path) -> None:
    prefix = lay_out(tmp_path)
    assert documents(prefix, strip_eod=2) == [[5, 6, 999], [4, 0]]
    assert documents(prefix, strip_eod=6) == DOCUMENTS  # ends a sequence, not a document
    assert documents(prefix, strip_eod=999, vocab_size=999) == [[5, 6], [4, 0, 2]]  # outside the vocabulary
    assert documents(prefix, strip_eod=70000) == DOCUMENTS
    twice = lay_out(tmp_path, data=bytes.fromhex("0200 0200 0200 0200 0000 0200"))
    assert documents(twice, strip_eod=2) == [[2, 2], [2, 0]]
    alone = lay_out(tmp_path, INDEX[:26] + struct.pack("<Q3i3q2q", 2, 1, 0, 0, 0, 2, 2, 0, 3), b"\2\0")
    assert documents(alone, strip_eod=2) == [[]]


@pytest.mark.parametrize(
    ("vocab_size", "data", "message"),
    [
        (999, BIN, r"v1\.text\.bin: id 999 of document 0 \(byte 4\) is outside the tokenizer's 999 tokens"),
        (1000, BIN[:-2] + b"\xe8\x03", r"id 1000 of document 1 \(byte 10\) .* --strip-eod"),
    ],
)
def test_ids_outside_the_vocabulary(tmp_path: Path, vocab_size: int, data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        documents(lay_out(tmp_path, data=data), vocab_size=vocab_size)


def test_negative_ids(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"id -1 of document 1 \(byte 8\)"):
        documents(lay_out(tmp_path, patched(17, b"\3"), BIN[:8] + b"\xff\xff" + BIN[10:]))


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize(
    ("index", "data", "message"),
    [
        (b"", BIN, r"\.idx is not the index of a Megatron dataset: it begins with b''"),
        (b"TNTIDX\0\0" + INDEX[8:], BIN, r"an index of the older formats of fairseq .*build the dataset again as mmap"),
        (FAIRSEQ, BIN, r"the index of a fairseq dataset \(mmap, 3 sequences\), .*dict.txt.* tools/prepare_corpus.py"),
        (FAIRSEQ[:17] + b"\x09" + FAIRSEQ[18:], BIN, r"the index of a fairseq dataset"),
        (FAIRSEQ[:18] + bytes(8), b"", r"the index of a fairseq dataset \(mmap, 0 sequences\)"),
        (POINTER, BIN, r"\.idx is a Git LFS pointer"),
        (INDEX, POINTER, r"\.bin is a Git LFS pointer"),
        (b"\x93NUMPY\1\0", BIN, r"expected b'MMIDIDX.*; it begins like a NumPy array"),
        (INDEX[:33], BIN, r"\.idx is truncated: 33 bytes, expected 34 of header"),
        (patched(9, b"\2"), BIN, r"\.idx has format version 2, this program reads 1"),
        (patched(17, b"\6"), BIN, r"\.idx has ids of type 6 \(float64\), expected an integer type: 1 uint8"),
        (patched(17, b"\x09"), BIN, r"ids of type 9 \(unknown\)"),
        (patched(26, b"\0"), BIN, r"damaged: no document indices, expected at least 1"),
        (INDEX[:-1], BIN, r"\.idx is truncated: 93 bytes, expected 94 .* 3 sequences and 3 document indices"),
        (INDEX + b"\0", BIN, r"\.idx is damaged: 95 bytes, expected 94"),
        (patched(18, b"\xff" * 8), BIN, r"\.idx is truncated: 94 bytes, expected 221,360,928,884,514,619,"),
        (INDEX[:18] + struct.pack("<QQq", 0, 1, 0), b"", r"\.idx has no sequence"),
        (INDEX + b"\0\1\0", BIN, r"sequence 1 has mode 1, expected 0: it is not text"),
        (patched(38, b"\xff\xff\xff\xff"), BIN, r"damaged: sequence 1 has length -1, expected 0 or more"),
        (patched(54, b"\6"), BIN, r"damaged: sequence 1 begins at byte 6 of the .bin, expected 4, where"),
        (patched(46, b"\2"), BIN, r"sequence 0 begins at byte 2 of the .bin, expected 0"),
        (patched(70, b"\1"), BIN, r"indices go from 1 to 3, expected from 0 to the number of sequences, 3"),
        (patched(86, b"\2"), BIN, r"indices go from 0 to 2, expected from 0 to the number of sequences, 3"),
        (patched(78, b"\4"), BIN, r"document 1 begins with sequence 4, and the next with 3; expected ascending numbers"),
        (patched(78, b"\xff" * 8), BIN, r"document 0 begins with sequence 0, and the next with -1"),
        (INDEX, BIN[:-1], r"\.bin is truncated: 11 bytes, expected 12 by .*\.idx"),
        (INDEX, BIN + b"\0", r"\.bin is damaged: 13 bytes, expected 12"),
        (INDEX[:34] + bytes(36) + INDEX[70:], b"", r"\.bin has no tokens"),
    ],
)
def test_every_fault_is_named(tmp_path: Path, index: bytes, data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        MegatronFile(lay_out(tmp_path, index, data))


def test_truncation_is_refused_wherever_it_cuts(tmp_path: Path) -> None:
    for size in range(len(INDEX)):
        with pytest.raises(DataError, match=r"v1\.text\.idx is (truncated|not the index)"):
            MegatronFile(lay_out(tmp_path, INDEX[:size]))
    for size in range(len(BIN)):
        with pytest.raises(DataError, match=r"v1\.text\.bin is truncated"):
            MegatronFile(lay_out(tmp_path, data=BIN[:size]))


@pytest.mark.parametrize("suffix", ["idx", "bin"])
def test_a_missing_file_is_named(tmp_path: Path, suffix: str) -> None:
    prefix = lay_out(tmp_path)
    (tmp_path / f"v1.text.{suffix}").unlink()
    with pytest.raises(DataError, match=rf"v1\.text\.{suffix} cannot be read"):
        MegatronFile(prefix)


@pytest.mark.usefixtures("block")
def test_what_is_written_byte_by_byte(tmp_path: Path) -> None:
    with MegatronWriter(tmp_path / "deep" / "a.b", vocab_size=1000) as writer:
        for document in ([5, 6], [999], np.array([4, 0, 2], np.uint32)):
            writer.add_document(document)
    assert (writer.num_documents, writer.num_tokens) == (3, 6)
    assert (tmp_path / "deep" / "a.b.bin").read_bytes() == BIN
    expected = INDEX[:26] + b"\4" + INDEX[27:70] + struct.pack("<4q", 0, 1, 2, 3)
    assert (tmp_path / "deep" / "a.b.idx").read_bytes() == expected
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["a.b.bin", "a.b.idx"]


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize(("vocab_size", "dtype"), [(1000, "<u2"), (65499, "<u2"), (65500, "<i4"), (128001, "<i4")])
def test_round_trip(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    given = [[5, 6, 7], [8], list(range(4, 900)), [vocab_size - 1, 0]]
    with MegatronWriter(tmp_path / "a", vocab_size=vocab_size, append_eod=8) as writer:
        for document in given:
            writer.add_document(document)
    assert MegatronFile(tmp_path / "a").ids.dtype == np.dtype(dtype)
    assert documents(tmp_path / "a", vocab_size=vocab_size) == [[*document, 8] for document in given]
    assert documents(tmp_path / "a", vocab_size=vocab_size, strip_eod=8) == given


@pytest.mark.parametrize("suffix", ["idx", "bin"])
def test_nothing_is_replaced_before_or_meanwhile(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    with pytest.raises(DataError, match=rf"a\.{suffix} exists already"):
        with MegatronWriter(tmp_path / "a", vocab_size=10) as writer:
            writer.add_document([1])
            path.write_bytes(b"mine")
    assert path.read_bytes() == b"mine" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(DataError, match=rf"a\.{suffix} exists already"):
        MegatronWriter(tmp_path / "a", vocab_size=10)
    assert path.read_bytes() == b"mine" and list(tmp_path.iterdir()) == [path]


def test_the_index_appears_last_and_an_interrupt_between_leaves_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, linked = os.link, []

    def interrupted(temporary: Path, path: Path) -> None:
        linked.append(path.name)
        if path.suffix == ".idx":
            assert (tmp_path / "a.bin").exists()
            raise KeyboardInterrupt
        link(temporary, path)

    monkeypatch.setattr(os, "link", interrupted)
    with pytest.raises(KeyboardInterrupt), MegatronWriter(tmp_path / "a", vocab_size=10) as writer:
        writer.add_document([1])
    assert linked == ["a.bin", "a.idx"] and list(tmp_path.iterdir()) == []


def test_an_error_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for bad in ([1, 10], [-1]):
        with pytest.raises(DataError, match=rf"a\.bin: id {bad[-1]} of document 1 .* 10 tokens"):
            with MegatronWriter(tmp_path / "a", vocab_size=10) as writer:
                writer.add_document([1])
                writer.add_document(bad)
    with pytest.raises(DataError, match="there are no documents"), MegatronWriter(tmp_path / "a", vocab_size=10):
        pass
    monkeypatch.setattr(megatron_writer, "_MAX_LENGTH", 2)
    with pytest.raises(DataError, match="document 0 has 3 ids, the format holds 2"):
        with MegatronWriter(tmp_path / "a", vocab_size=10, append_eod=3) as writer:
            writer.add_document([1, 2])
    assert list(tmp_path.iterdir()) == []
