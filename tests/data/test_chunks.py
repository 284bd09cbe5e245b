"""The list of pieces: made once whoever asks, right to the token, never half there."""

import json
import multiprocessing as mp
import os
import resource
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from deberta_dist.data import chunks
from deberta_dist.data.chunks import HEADER_BYTES, count_chunks, open_chunks
from deberta_dist.data.token_corpus import open_corpus
from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.errors import ConfigError, DataError
from tests.data.conftest import corpus_of

LENGTHS = (8, 16, 32)


def expected_pieces(lengths: list[int]) -> list[list[tuple[int, int]]]:
    """(first token, tokens) of the pieces of each bucket, in the order of the text: the plain way."""
    found, begin = [[], [], []], 0
    for length in lengths:
        for start in range(0, length, 30):
            tokens = min(30, length - start)
            found[0 if tokens <= 6 else 1 if tokens <= 14 else 2].append((begin + start, tokens))
        begin += length
    return found


@pytest.mark.parametrize("together", [(1, 1), (3, 2), (1 << 16, 1 << 17)])
def test_pieces_are_right_however_they_are_made(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: tuple[int, int]
) -> None:
    monkeypatch.setattr(chunks, "_DOCUMENTS_TOGETHER", together[0])
    monkeypatch.setattr(chunks, "_CHUNKS_TOGETHER", together[1])
    lengths = [1, 6, 7, 14, 15, 30, 31, 60, 61, 36, 37, 500, 2]
    corpus = corpus_of(tmp_path / "a.tokens", tokenizer, lengths)
    found, expected = open_chunks(corpus, LENGTHS), expected_pieces(lengths)
    assert found.path == tmp_path / f"a.tokens.8-16-32.{corpus.checksum[:12]}.pieces"
    assert found.path.stat().st_size == HEADER_BYTES + 8 * sum(map(len, expected))
    assert found.sizes == count_chunks(corpus, LENGTHS)
    assert found.sizes.num_chunks == tuple(map(len, expected)) and sum(found.sizes.num_tokens) == sum(lengths)
    for bucket, want in enumerate(expected):
        starts, tokens = found.read(bucket, np.arange(len(want))[::-1])
        assert list(zip(starts.tolist(), tokens.tolist(), strict=True)) == want[::-1]
        padding = 1 - sum(count + 2 for _, count in want) / (len(want) * LENGTHS[bucket])
        assert found.sizes.padding(bucket) == pytest.approx(padding)


def test_memory_does_not_grow_with_a_document(tokenizer: Tokenizer, tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "a.tokens", tokenizer, [3_000_000])
    peaks = []
    for length in (12, 3):  # 300,000 and 3,000,000 pieces
        tracemalloc.start()
        open_chunks(corpus, (length,))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


def test_a_list_is_used_again_and_serves_its_own_text_only(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.tokens"
    first = open_chunks(corpus_of(path, tokenizer, [5, 50]), LENGTHS)
    made = first.path.stat().st_ino
    assert open_chunks(open_corpus(path), LENGTHS).path.stat().st_ino == made
    path.unlink()
    second = open_chunks(corpus_of(path, tokenizer, [20, 20, 3]), LENGTHS)
    assert second.sizes.num_chunks == (1, 0, 2)
    second.path.write_bytes(first.path.read_bytes())  # under its name, the list of another text
    assert open_chunks(open_corpus(path), LENGTHS).sizes == second.sizes
    with open(second.path, "r+b") as file:
        file.truncate(HEADER_BYTES + 8)
    again = open_chunks(open_corpus(path), LENGTHS)
    assert again.read(2, np.array([1]))[1].tolist() == [20]
    elsewhere = open_chunks(open_corpus(path), LENGTHS, directory=tmp_path / "lists")
    assert elsewhere.path.parent == tmp_path / "lists" and elsewhere.sizes == second.sizes


def make_and_tell(path: Path, made: Path) -> None:
    write = chunks._write

    def counted(*arguments) -> None:
        (made / str(os.getpid())).touch()
        write(*arguments)

    chunks._write = counted
    assert open_chunks(open_corpus(path), LENGTHS).sizes.num_chunks[2] == 3000


def test_one_process_makes_it_and_the_others_wait(tokenizer: Tokenizer, tmp_path: Path) -> None:
    checksum = corpus_of(tmp_path / "a.tokens", tokenizer, [30] * 3000).checksum
    killed = tmp_path / f".a.tokens.8-16-32.{checksum[:12]}.pieces.{os.getpid()}.tmp"
    killed.write_bytes(b"half")
    made = tmp_path / "made"
    made.mkdir()
    processes = [mp.get_context("fork").Process(target=make_and_tell, args=(tmp_path / "a.tokens", made)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 6
    assert len(list(made.iterdir())) == 1
    assert not killed.exists(), "what a killed process has left is taken away"


def test_a_full_disk_leaves_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "a.tokens", tokenizer, [30] * 3000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (HEADER_BYTES + 4000, hard))
    try:
        with pytest.raises(DataError, match=r"pieces is not written \(File too large\): make room"):
            open_chunks(corpus, LENGTHS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.glob("*.pieces")) and not list(tmp_path.glob(".*.tmp"))
    assert open_chunks(corpus, LENGTHS).sizes.num_chunks == (0, 0, 3000)


def test_what_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "a.tokens", tokenizer, [5, 50])
    with pytest.raises(ConfigError, match="bucket length = 70000 is more than the 65537"):
        open_chunks(corpus, (70_000,))
    with pytest.raises(ConfigError, match=r"pieces cannot be made .*data\.index_directory"):
        open_chunks(corpus, LENGTHS, directory=corpus.path / "no directory")
    path = tmp_path / f"a.tokens.8-16-32.{corpus.checksum[:12]}.pieces"
    for foreign in (b"", b"anything", json.dumps({"format": "deberta_dist pieces 2"}).encode()):
        path.write_bytes(foreign)
        with pytest.raises(DataError, match="not a list of chunks that this version reads: move it away"):
            open_chunks(corpus, LENGTHS)
        assert path.read_bytes() == foreign
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match="not a list of chunks that this version reads: move it away"):
        open_chunks(corpus, LENGTHS)
    path.rmdir()
    found = open_chunks(corpus, LENGTHS)
    with open(path, "r+b") as file:
        file.seek(HEADER_BYTES)
        file.write(b"\xff" * 8)
    with pytest.raises(DataError, match="is damaged: bucket 0 holds other lengths; remove it"):
        found.read(0, np.array([0]))
