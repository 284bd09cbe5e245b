"""What is shown of a token file, and that every damage is found and placed."""

import hashlib
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from deberta_dist.data.corpus_index import write_index
from deberta_dist.data.token_file import TokenFile
from deberta_dist.data.token_writer import TokenFileWriter
from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.errors import ConfigError, DataError
from deberta_dist.preparation.formats import inspect as inspection
from deberta_dist.preparation.formats.inspect import describe, faults, inspect, is_damaged, length_statistics
from tests.preparation.test_tools import assert_one_line_error, run

# 903 ids: offsets begin at 4096 + 1806, up to a multiple of 8
DOCUMENTS = [[5, 6, 7], [8], list(range(4, 901)), [999, 0]]
OFFSETS_START = 5904


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a.tokens"
    with TokenFileWriter(path, tokenizer_sha256="ab" * 32, vocab_size=1000, source="here\nthere") as writer:
        for document in DOCUMENTS:
            writer.add_document(document)
    return path


def change(path: Path, place: int, value: bytes, *, sign: bool = False) -> None:
    """Overwrites bytes; ``sign`` makes the checksum right for them."""
    content = bytearray(path.read_bytes())
    content[place : place + len(value)] = value
    if sign:
        length = struct.unpack_from("<I", content, 12)[0]
        header = json.loads(content[20 : 20 + length])
        header["checksum"] = hashlib.sha256(content[4096:]).hexdigest()
        new = json.dumps(header).encode()
        assert len(new) == length
        content[16 : 20 + length] = struct.pack("<I", zlib.crc32(new)) + new
    path.write_bytes(content)


@pytest.mark.parametrize("block", [1, 3, 1 << 18])
def test_length_statistics_against_numpy(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(inspection, "_BLOCK", block)
    rng = np.random.default_rng(0)
    for count in (1, 2, 3, 19, 20, 21, 100):
        lengths = rng.integers(1, 300, count)
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        median, p95 = np.percentile(lengths, [50, 95], method="inverted_cdf")
        expected = {"min": lengths.min(), "median": median, "p95": p95, "max": lengths.max()}
        assert length_statistics([offsets]) == expected
        cut = count // 2
        assert length_statistics([offsets[: cut + 1], offsets[cut:]] if cut else [offsets]) == expected
    long = {"min": 1, "median": 1, "p95": 1 << 33, "max": 1 << 33}
    assert length_statistics([np.array([0, 1 << 33, (1 << 33) + 1])]) == long


def test_header_and_documents(path: Path) -> None:
    found = inspect(path, num_documents=2)
    assert {key: found[key] for key in ("format_version", "dtype", "vocab_size", "num_tokens", "num_documents")} == {
        "format_version": 1,
        "dtype": "uint16",
        "vocab_size": 1000,
        "num_tokens": 903,
        "num_documents": 4,
    }
    assert (found["tokenizer_sha256"], found["num_bytes"]) == ("ab" * 32, path.stat().st_size)
    assert found["lengths"] == {"min": 1, "median": 2, "p95": 897, "max": 897}
    assert found["verified"] is None and not is_damaged(None)
    assert found["documents"] == [
        {"number": 0, "num_tokens": 3, "ids": [5, 6, 7]},
        {"number": 1, "num_tokens": 1, "ids": [8]},
    ]
    text = describe(found)
    assert "903 tokens in 4 documents, uint16" in text and r"source: 'here\nthere'" in text and "5 6 7" in text
    assert "median 2, p95 897" in text
    assert inspect(path, document=3)["documents"] == [{"number": 3, "num_tokens": 2, "ids": [999, 0]}]
    assert len(inspect(path, num_documents=9)["documents"]) == 4


def test_documents_as_text(token_file: TokenFile, tokenizer: Tokenizer, texts: list[str]) -> None:
    found = inspect(token_file.path, tokenizer=tokenizer, document=1, verify=True)
    assert found["verified"] == {"checksum": None, "ids": None, "offsets": None} and not is_damaged(found["verified"])
    assert found["documents"][0]["text"] == tokenizer.decode(tokenizer.encode(texts[1]))
    assert found["documents"][0]["text"] in describe(found) and "checksum: right" in describe(found)


def test_a_directory_is_shown_as_one(path: Path, tmp_path: Path) -> None:
    """Documents by their number in the whole, lengths of all files, damage with the file's name."""
    directory = tmp_path / "many"
    for number, documents in enumerate((DOCUMENTS[:1], DOCUMENTS[1:3], DOCUMENTS[3:])):
        with TokenFileWriter(directory / f"{number}.tokens", tokenizer_sha256="ab" * 32, vocab_size=1000) as writer:
            for document in documents:
                writer.add_document(document)
    write_index(directory, ["0.tokens", "1.tokens", "2.tokens"], source="three")
    one, many = (inspect(corpus, num_documents=4, verify=True) for corpus in (path, directory))
    for key in ("num_tokens", "num_documents", "dtype", "lengths", "verified", "documents"):
        assert many[key] == one[key]
    assert [file["num_documents"] for file in many["files"]] == [1, 2, 1] and one["files"] == []
    text = describe(many)
    assert "many: 3 token files, format version 1" in text and "1.tokens: 898 tokens in 2 documents" in text
    assert inspect(directory, document=3)["documents"] == [{"number": 3, "num_tokens": 2, "ids": [999, 0]}]
    change(directory / "1.tokens", 4096, struct.pack("<H", 1000))
    change(directory / "2.tokens", 4096, struct.pack("<H", 7))
    verified = inspect(directory, verify=True)["verified"]
    assert verified["checksum"].startswith("1.tokens: content has") and verified["checksum"].endswith("; 1 more files")
    assert verified["ids"].startswith("1.tokens: id 1000 at token 0") and verified["offsets"] is None


def test_refusals(path: Path, token_file: TokenFile, other_tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"valid.tokens was made with the tokenizer .* give the tokenizer"):
        inspect(token_file.path, tokenizer=other_tokenizer)
    for number in (4, -1):
        with pytest.raises(ConfigError, match=rf"--document {number}: .* has documents 0 to 3"):
            inspect(path, document=number)
    with pytest.raises(ConfigError, match="--documents -1"):
        inspect(path, num_documents=-1)


def test_any_flipped_bit_is_found(path: Path) -> None:
    whole = path.read_bytes()
    for place in (4096, 5000, OFFSETS_START - 1, OFFSETS_START + 8, len(whole) - 9):
        change(path, place, bytes([whole[place] ^ 1]))
        found = inspect(path, verify=True, num_documents=1)
        assert "the header says" in found["verified"]["checksum"] and is_damaged(found["verified"])
        assert found["documents"] == [] and "checksum: WRONG" in describe(found)
        path.write_bytes(whole)
    assert not is_damaged(inspect(path, verify=True)["verified"])


@pytest.mark.parametrize("block_bytes", [2, 10, 1 << 22])
def test_an_id_outside_the_vocabulary_is_placed(path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    monkeypatch.setattr("deberta_dist.data.token_file.COPY_BYTES", block_bytes)
    change(path, 4096 + 2 * 902, struct.pack("<H", 4000))
    change(path, 4096 + 2 * 3, struct.pack("<H", 1000), sign=True)
    expected = r"id 1000 at token 3 (byte 4102, document 1) is not below vocab_size = 1000; 2 such ids in all"
    assert faults(TokenFile(path)) == {"checksum": None, "ids": expected, "offsets": None}


@pytest.mark.parametrize("block", [1, 1 << 18])
def test_offsets_that_do_not_ascend_are_placed(path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(inspection, "_BLOCK", block)
    change(path, OFFSETS_START + 16, struct.pack("<q", 3), sign=True)
    where = f"document 1 begins at token 3 and ends at 3 (offset at byte {OFFSETS_START + 16})"
    found = inspect(path, verify=True)
    assert found["verified"]["offsets"].startswith(where) and found["lengths"] is None
    assert (found["verified"]["checksum"], found["verified"]["ids"]) == (None, None)
    assert "offsets: WRONG: document 1" in describe(found)
    with pytest.raises(DataError, match="a.tokens is damaged: document 1 begins at token 3"):
        inspect(path)


def test_from_the_command_line(path: Path, token_file: TokenFile, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tool = "inspect_corpus.py"
    shown = run(tool, "a.tokens", "--verify", cwd=tmp_path)
    assert shown.returncode == 0 and "offsets: right" in shown.stdout and shown.stderr == ""
    shown = run(tool, token_file.path, "--tokenizer", tokenizer.path, "--documents", 2, "--json", cwd=tmp_path)
    assert shown.returncode == 0 and len(json.loads(shown.stdout)["documents"]) == 2
    assert_one_line_error(
        run(tool, "a.tokens", "--tokenizer", tokenizer.path, cwd=tmp_path), code=65, words="was made with the tokenizer"
    )
    assert_one_line_error(run(tool, "b.tokens", cwd=tmp_path), code=65, words="cannot be read")
    assert_one_line_error(run(tool, "a.tokens", "--document", 4, cwd=tmp_path), code=2, words="documents 0 to 3")
    change(path, 4096, b"\1")
    shown = run(tool, "a.tokens", "--verify", "--json", cwd=tmp_path)
    assert shown.returncode == 65 and json.loads(shown.stdout)["verified"]["checksum"] and shown.stderr == ""
