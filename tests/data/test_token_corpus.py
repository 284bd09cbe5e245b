"""A corpus of several files reads as one file does, and what does not belong together is refused by name."""

import json
import resource
import struct
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from deberta_dist.data import token_corpus
from deberta_dist.data.corpus_index import write_index
from deberta_dist.data.loader import MaskedLMDataset
from deberta_dist.data.masking import MaskingConfig
from deberta_dist.data.token_corpus import TokenCorpus, open_corpus
from deberta_dist.data.token_file import FIXED, TokenFile, pack_header
from deberta_dist.data.token_writer import TokenFileWriter
from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.errors import DataError

Many = tuple[TokenFile, TokenCorpus]


def write_shards(directory: Path, file: TokenFile, *, first_documents: list[int]) -> TokenCorpus:
    """The documents of a file as a corpus of shards that begin with the documents given."""
    names = []
    for number, (first, stop) in enumerate(pairwise([*first_documents, file.num_documents])):
        names.append(f"{number:03}.tokens")
        offsets = file.document_offsets[first : stop + 1]
        with TokenFileWriter(
            directory / names[-1], tokenizer_sha256=file.tokenizer_sha256, vocab_size=file.vocab_size
        ) as writer:
            writer.add_documents(file.ids[offsets[0] : offsets[-1]], np.diff(offsets))
    write_index(directory, names, source="of one file")
    return open_corpus(directory)


@pytest.fixture
def many(tmp_path: Path) -> Many:
    """A file of 1,203 documents of 1 to 9 tokens, more than one page of offsets, and the same as seven shards."""
    lengths = np.random.default_rng(1).integers(1, 10, 1203)
    with TokenFileWriter(tmp_path / "one.tokens", tokenizer_sha256="ab" * 32, vocab_size=1 << 17) as writer:
        writer.add_documents(np.arange(lengths.sum()), lengths)
    file = TokenFile(tmp_path / "one.tokens")
    return file, write_shards(tmp_path / "many", file, first_documents=[0, 1, 2, 600, 601, 1000, 1202])


def test_shards_read_as_one_file(many: Many) -> None:
    file, corpus = many
    ids, offsets = np.array(file.ids), np.array(file.document_offsets)
    one = open_corpus(file.path)
    assert (one.checksum, one.source, one.dtype) == (file.checksum, file.source, file.dtype)
    assert corpus.checksum != one.checksum and len(corpus.shards) == 7 and corpus.source == "of one file"
    for found in (one, corpus, open_corpus(corpus.path)):
        assert (found.num_tokens, found.num_documents) == (file.num_tokens, file.num_documents)
        found.verify()
        rng = np.random.default_rng(0)
        ends = np.sort(rng.integers(0, file.num_tokens + 1, (200, 2))).tolist()
        for start, stop in [(0, file.num_tokens), (0, 0), (file.num_tokens, file.num_tokens), *ends]:
            assert np.array_equal(found.read(start, stop), ids[start:stop])
            assert found.read(start, stop).dtype == ids.dtype
        for start, stop in np.sort(rng.integers(0, file.num_documents + 2, (100, 2))).tolist():
            assert np.array_equal(found.document_offsets(start, stop), offsets[start:stop])
        for separators in (0, 1):
            places = range(file.num_tokens + separators * file.num_documents)
            expected = np.searchsorted(offsets + separators * np.arange(offsets.size), places, side="right") - 1
            assert [found.document_at(place, num_separators=separators) for place in places] == expected.tolist()


@pytest.mark.parametrize("boundaries", [True, False])
def test_samples_do_not_depend_on_where_shards_end(
    token_file: TokenFile, tokenizer: Tokenizer, tmp_path: Path, boundaries: bool
) -> None:
    shards = write_shards(tmp_path, token_file, first_documents=[0, 1, 2, 5, 9, 10, 16])
    one, seven = (
        MaskedLMDataset(corpus, tokenizer, max_seq_length=48, masking=MaskingConfig(), seed=3, document_boundaries=boundaries)
        for corpus in (open_corpus(token_file.path), shards)
    )
    assert one.num_samples == seven.num_samples
    first, second = (data.batch(5, 2 * data.num_samples) for data in (one, seven))
    assert torch.equal(first.input_ids, second.input_ids) and torch.equal(first.labels, second.labels)
    assert (first.document_ids is not None) == boundaries
    assert not boundaries or torch.equal(first.document_ids, second.document_ids)


def test_opening_takes_no_memory_for_documents_or_tokens(many: Many) -> None:
    """The same bytes for a billion of both, which are a hole in the file."""

    def peak(path: Path) -> int:
        tracemalloc.start()
        corpus = open_corpus(path)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert corpus.document_at(corpus.num_tokens - 1) > 0
        return found

    small, huge, number = many[0].path, many[0].path.with_name("huge.tokens"), 10**9
    with open(small, "rb") as file:
        _, _, length, _ = FIXED.unpack(file.read(FIXED.size))
        header = json.loads(file.read(length)) | {"num_tokens": number, "num_documents": number}
    with open(huge, "wb") as file:
        file.write(pack_header(header))
        file.seek(4096 + 4 * number + 8 * number)
        file.write(struct.pack("<q", number))
    peak(small)
    assert peak(huge) < peak(small) + 10_000 < 100_000


def test_more_shards_than_files_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_corpus, "_MAX_OPEN_FILES", 8)
    names = [f"{number:03}.tokens" for number in range(100)]
    for number, name in enumerate(names):
        with TokenFileWriter(tmp_path / name, tokenizer_sha256="ab" * 32, vocab_size=1000) as writer:
            writer.add_document([number] * 3)
    write_index(tmp_path, names)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 20, limits[1]))
    try:
        corpus = open_corpus(tmp_path)
        for token in np.random.default_rng(0).permutation(300).tolist():
            assert corpus.read(token, token + 1) == token // 3
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def change_index(directory: Path, change: Callable[[dict], object]) -> None:
    path = directory / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def test_files_that_do_not_belong_are_refused(many: Many, tmp_path: Path) -> None:
    _file, corpus = many
    directory, third = corpus.path, corpus.path / "002.tokens"
    content = third.read_bytes()

    def refusal() -> str:
        with pytest.raises(DataError) as caught:
            open_corpus(directory)
        return str(caught.value)

    third.rename(tmp_path / "away")
    assert "002.tokens is missing, as 1 of 7 files" in refusal()
    third.write_bytes((directory / "003.tokens").read_bytes())
    assert "002.tokens is not the file that index.json beside it names: it has" in refusal()
    third.write_bytes(content[:-8])
    assert "002.tokens is truncated" in refusal()
    third.unlink()
    with TokenFileWriter(third, tokenizer_sha256="cd" * 32, vocab_size=1 << 17) as writer:
        writer.add_document([1])
    assert "002.tokens was made with the tokenizer cdcdcd" in refusal()
    third.write_bytes(content)
    (directory / "0025.tokens").write_bytes(content)
    assert "0025.tokens is not in index.json beside it" in refusal()
    (directory / "0025.tokens").unlink()
    # The same text in another order is another corpus.
    change_index(directory, lambda index: index["files"].reverse())
    assert open_corpus(directory).checksum != corpus.checksum
    third.write_bytes((directory / "003.tokens").read_bytes())
    with pytest.raises(DataError, match="002.tokens has changed since it was opened"):
        list(corpus.files())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.update(format_version=2), "has format version 2, this program reads 1"),
        (lambda index: index.pop("files"), r"index.json is damaged \('files'\)"),
        (lambda index: index.update(files=[]), "no files"),
        (lambda index: index["files"].append(index["files"][0]), "one of them twice"),
        (lambda index: index["files"][0].update(name="../000.tokens"), "is not the name of a token file"),
        (lambda index: index["files"][0].update(num_tokens="5"), r"index.json is damaged \(000.tokens has"),
        (lambda index: index["files"][0].update(checksum="xy"), "index.json is damaged"),
        (lambda index: index["files"][0].update(size=1), "index.json is damaged"),
        (lambda index: index.update(vocab_size=None), "index.json is damaged"),
    ],
)
def test_a_damaged_index_is_refused(many: Many, change: Callable[[dict], object], message: str) -> None:
    change_index(many[1].path, change)
    with pytest.raises(DataError, match=message):
        open_corpus(many[1].path)


def test_what_is_no_corpus(many: Many, tmp_path: Path) -> None:
    directory = many[1].path
    with pytest.raises(DataError, match=r"holds some \(many\): name one, or each in a table \[data.sources.NAME\]"):
        open_corpus(tmp_path)
    with pytest.raises(DataError, match="index.json exists already"):
        write_index(directory, ["000.tokens"])
    (directory / "index.json").write_text("{")
    with pytest.raises(DataError, match="index.json is damaged"):
        open_corpus(directory)
    (directory / "index.json").unlink()
    with pytest.raises(DataError, match="its preparation has not ended"):
        open_corpus(directory)
    with TokenFileWriter(directory / "z.tokens", tokenizer_sha256="cd" * 32, vocab_size=9) as writer:
        writer.add_document([1])
    with pytest.raises(DataError, match="z.tokens was made with the tokenizer cdcd"):
        write_index(directory, ["000.tokens", "z.tokens"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="it has no index.json"):
        open_corpus(tmp_path / "empty")
    with pytest.raises(DataError, match="gone.tokens cannot be read"):
        open_corpus(tmp_path / "gone.tokens")
