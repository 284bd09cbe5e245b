"""The data benchmark: its peer masks as we do, a difference is noticed, and its large file is a token file."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import data
from benchmarks.data_inputs import bundled_text
from benchmarks.data_masking import OFFICIAL, PUBLISHED, UNIFORM, compare, consumed_per_second, rates
from benchmarks.data_memory import write_sparse
from benchmarks.data_preparation import OURS, RAW, write_text
from benchmarks.draw_batches import memory
from benchmarks.published_masking import PublishedMasking
from deberta_dist.data.loader import MaskedLMDataset
from deberta_dist.data.masking import MaskingConfig
from deberta_dist.data.token_corpus import open_corpus
from deberta_dist.data.token_file import TokenFile
from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.errors import ConfigError
from deberta_dist.operations.measure import BenchmarkError, Sample

LENGTH = 128

Masked = tuple[np.ndarray, np.ndarray]


def ours(file: TokenFile, tokenizer: Tokenizer, *, method: str) -> Masked:
    masking = MaskingConfig(method=method)
    corpus = open_corpus(file.path)
    samples = MaskedLMDataset(corpus, tokenizer, max_seq_length=LENGTH, masking=masking, seed=1, shuffle=False)
    batch = samples.batch(0, samples.num_samples)
    return batch.input_ids.numpy(), batch.labels.numpy()


@pytest.fixture(scope="module")
def published(token_file: TokenFile, tokenizer: Tokenizer) -> Masked:
    width = LENGTH - 2
    num_samples = token_file.num_tokens // width
    peer = PublishedMasking(
        [" ".join(tokenizer.pieces(token_file.ids[i * width : (i + 1) * width])) for i in range(num_samples)],
        pieces=tokenizer.pieces(range(tokenizer.num_tokens)),
        word_starts=tokenizer.pieces(np.flatnonzero(tokenizer.is_word_start)),
        max_length=LENGTH,
        max_ngram=3,
    )
    batch = peer.batch(range(num_samples))
    assert all(column.shape == (num_samples, LENGTH) for column in batch.values())
    return batch["input_ids"].numpy(), batch["labels"].numpy()


def test_official_masks_as_published(token_file: TokenFile, tokenizer: Tokenizer, published: Masked) -> None:
    found = compare(*ours(token_file, tokenizer, method="official"), *published, mask_id=tokenizer.mask_id)
    assert 18 < found["targets"]["published"] < 20 and found["targets"]["ours"] == pytest.approx(19.2, abs=0.8)


def test_the_published_procedure_takes_whole_words(tokenizer: Tokenizer, published: Masked) -> None:
    input_ids, labels = published
    originals = np.where(labels > 0, labels, input_ids)
    is_special = np.isin(originals, tokenizer.special_ids)
    assert not labels[is_special].any()
    places = np.flatnonzero(~is_special)
    begins = tokenizer.is_word_start[originals.reshape(-1)[places]]
    begins |= np.diff(places // LENGTH, prepend=-1) > 0
    word = np.cumsum(begins)
    taken = np.bincount(word, weights=labels.reshape(-1)[places] > 0)
    assert np.all((taken == 0) | (taken == np.bincount(word)))


def test_differences_are_noticed(token_file: TokenFile, tokenizer: Tokenizer, published: Masked) -> None:
    input_ids, labels = ours(token_file, tokenizer, method="official")
    options = {"mask_id": tokenizer.mask_id}
    with pytest.raises(BenchmarkError, match="standard errors apart"):
        compare(*ours(token_file, tokenizer, method="uniform"), *published, **options)
    with pytest.raises(BenchmarkError, match="same samples"):
        compare(input_ids[::-1], labels[::-1], *published, **options)
    with pytest.raises(BenchmarkError, match=r"targets that are \[MASK\]"):
        compare(np.where(labels > 0, tokenizer.mask_id, input_ids), labels, *published, **options)
    fewer = labels * (np.arange(len(labels)) % 4 > 0)[:, None]
    with pytest.raises(BenchmarkError, match="^targets per sample"):
        compare(np.where(fewer == labels, input_ids, labels), fewer, *published, **options)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The part leaves torch with one thread."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_masking_part_tells_rates_and_multiples(token_file: TokenFile, tokenizer: Tokenizer, tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int)
    data.add_arguments(parser)
    given = ["--rounds", "2", "--samples", "40", "--part", "masking", "--directory", str(tmp_path)]
    files = ["--tokenizer", str(tokenizer.path), "--tokens", str(token_file.path)]
    found = data.run(parser.parse_args([*given, *files]))["parts"]["masking"]
    assert list(found["contestants"]) == [PUBLISHED, OFFICIAL, UNIFORM]
    for row in found["contestants"].values():
        low, high = row["tokens_per_second_range"]
        assert 0 < low <= row["tokens_per_second"] <= high
        for gpu, consumed in found["consumption"].items():
            assert row["times_consumption"][gpu] == pytest.approx(row["tokens_per_second"] / consumed)
    with pytest.raises(ConfigError, match="belong together"):
        data.run(parser.parse_args([*given, *files[:2]]))


def test_preparation_part_compares_the_same_text(tokenizer: Tokenizer, token_file: TokenFile, tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int)
    data.add_arguments(parser)
    given = ["--rounds", "1", "--megabytes", "0.3", "--cores", "2", "--part", "preparation", "--directory", str(tmp_path)]
    files = ["--tokenizer", str(tokenizer.path), "--tokens", str(token_file.path)]
    found = data.run(parser.parse_args([*given, *files]))["parts"]["preparation"]
    rates = {name: row["bytes_per_second"] for name, row in found["contestants"].items()}
    assert len(rates) == 4 and found["tokens"] > 0 and found["bytes"] >= 300_000
    one, two = f"{OURS}, 1 core", f"{OURS}, 2 cores"
    assert found["scaling"][OURS] == pytest.approx(rates[two] / rates[one])
    assert found["share_of_raw"][1] == pytest.approx(rates[one] / rates[f"{RAW}, 1 core"])
    assert found["core_hours_of_160_gb"][2] == pytest.approx(2 * 160e9 / rates[two] / 3600)


def test_the_measured_text_has_no_duplicates(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    written = write_text(path, source=bundled_text(), num_bytes=12_000_000)
    lines = path.read_bytes().splitlines()
    assert len(set(lines)) == len(lines) and 12_000_000 <= written < 18_000_000
    assert 3_000 < written / len(lines) < 6_000


def test_rates_are_in_processor_time() -> None:
    rounds = [Sample(wall_seconds=9.0, cpu_seconds=cpu, peak_bytes=0) for cpu in (1.0, 2.0, 4.0)]
    found = rates(rounds, num_tokens=800, consumption={"A100": 100.0})
    assert found["tokens_per_second"] == 400 and found["tokens_per_second_range"] == [200, 800]
    assert found["times_consumption"] == {"A100": 4.0}


def test_a_data_rank_consumes_eight_gpus() -> None:
    assert consumed_per_second() == pytest.approx({"A100": 8 * 13e3, "H100": 8 * 41.5e3}, rel=0.02)


def test_a_sparse_file_is_a_token_file(token_file: TokenFile, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "large.tokens"
    write_sparse(path, like=token_file.path, num_bytes=10_000_000_001)
    file = TokenFile(path)
    file.require_tokenizer(tokenizer)
    assert file.num_tokens == 5_000_000_000 and path.stat().st_size == 4096 + 10_000_000_000 + 16
    assert path.stat().st_blocks * 512 < 1_000_000
    assert not file.read(file.num_tokens - 510, file.num_tokens).any()


def test_pages_of_a_file_are_told_from_other_memory(token_file: TokenFile, tmp_path: Path) -> None:
    path = tmp_path / "mapped.tokens"
    write_sparse(path, like=token_file.path, num_bytes=20_000_000)
    file = TokenFile(path)
    assert memory(path)["mapped"] < 1_000_000
    file.read(0, file.num_tokens)
    assert memory(path)["mapped"] < 1_000_000
    file.ids.max()
    found = memory(path)
    assert 10_000_000 < found["mapped"] < 21_000_000
    assert found["resident"] > found["mapped"] + found["anonymous"] and found["peak_resident"] > found["mapped"]
