"""Several sources by position: no sample lost or repeated, no source moved by another, the same for all ranks."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from deberta_dist.data.loader import Batch, MaskedLMDataset
from deberta_dist.data.masking import MaskingConfig
from deberta_dist.data.sources import BlendedDataset, CorpusSource, SourcePosition
from deberta_dist.data.token_corpus import TokenCorpus, open_corpus
from deberta_dist.data.token_file import TokenFile
from deberta_dist.data.token_writer import TokenFileWriter
from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.errors import ConfigError, DataError

SIZES = {"books": 7, "web": 33, "wiki": 20}  # samples of 30 tokens

Corpora = dict[str, TokenCorpus]


def write(path: Path, file: TokenFile, start: int, stop: int) -> TokenCorpus:
    with TokenFileWriter(path, tokenizer_sha256=file.tokenizer_sha256, vocab_size=file.vocab_size) as writer:
        writer.add_document(file.ids[start:stop])
    return open_corpus(path)


@pytest.fixture(scope="module")
def corpora(token_file: TokenFile, tmp_path_factory: pytest.TempPathFactory) -> Corpora:
    """Three stretches of the text; a rest behind the last sample of each."""
    directory, start, found = tmp_path_factory.mktemp("sources"), 0, {}
    for name, size in SIZES.items():
        found[name] = write(directory / f"{name}.tokens", token_file, start, start + size * 30 + 11)
        start += size * 30 + 11
    return found


def blended(sources: list[CorpusSource], tokenizer: Tokenizer, *, seed: int = 5, boundaries: bool = False) -> BlendedDataset:
    return BlendedDataset(
        sources, tokenizer, max_seq_length=32, masking=MaskingConfig(), seed=seed, document_boundaries=boundaries
    )


def originals(batch: Batch) -> list[tuple[int, ...]]:
    return [tuple(row) for row in torch.where(batch.labels > 0, batch.labels, batch.input_ids).tolist()]


def rows_of(data: BlendedDataset, name: str, *, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels of one source among the first ``count`` samples."""
    number = [source.name for source in data.mixture.sources].index(name)
    batch, chosen = data.batch(0, count), torch.tensor(data.mixture.blend.sources_at(0, count)) == number
    return batch.input_ids[chosen], batch.labels[chosen]


def proportions(corpora: Corpora, **shares: float) -> list[CorpusSource]:
    return [CorpusSource(name=name, corpus=corpora[name], proportion=share) for name, share in shares.items()]


def test_no_sample_is_lost_or_repeated(corpora: Corpora, tokenizer: Tokenizer) -> None:
    """Of each source, k epochs have every sample k times, in an order of its own each; read by 1, then 2, then 4 ranks."""
    data = blended(proportions(corpora, wiki=0.35, books=0.21, web=0.44), tokenizer)
    rows, consumed = [], 0
    for ranks, steps in ((1, 5), (2, 8), (4, 9)):
        for _ in range(steps):
            for rank in range(ranks):
                rows += originals(data.batch(consumed + rank * (16 // ranks), 16 // ranks))
            consumed += 16
    sources = data.mixture.blend.sources_at(0, consumed)
    for number, (name, size) in enumerate(SIZES.items()):
        one = MaskedLMDataset(corpora[name], tokenizer, max_seq_length=32, masking=MaskingConfig(), seed=0, shuffle=False)
        expected = originals(one.batch(0, size))
        assert len(set(expected)) == size == one.num_samples
        of_source = [row for row, source in zip(rows, sources, strict=True) if source == number]
        epochs = len(of_source) // size
        assert epochs >= 4
        for k in range(1, epochs + 1):
            assert Counter(of_source[: k * size]) == Counter(expected * k)
        assert of_source[:size] != of_source[size : 2 * size]


@pytest.mark.parametrize("boundaries", [True, False])
def test_any_split_and_any_start_give_the_same_rows(corpora: Corpora, tokenizer: Tokenizer, boundaries: bool) -> None:
    """What data-parallel ranks and resumed runs ask for, whatever the order of the tables."""
    shares = {"wiki": 0.3, "books": 0.3, "web": 0.4}
    whole = blended(proportions(corpora, **shares), tokenizer, boundaries=boundaries).batch(0, 240)
    fresh = blended(proportions(corpora, **dict(sorted(shares.items()))), tokenizer, boundaries=boundaries)
    names = ("input_ids", "labels", "attention_mask") + ("document_ids",) * boundaries
    for size in (1, 3, 16, 60):
        for start in (0, 7, 101, 180):
            batch = fresh.batch(start, size)
            assert (batch.document_ids is not None) == boundaries
            for name in names:
                assert torch.equal(getattr(batch, name), getattr(whole, name)[start : start + size])


def test_another_source_moves_none(corpora: Corpora, tokenizer: Tokenizer) -> None:
    two = blended(proportions(corpora, wiki=0.5, books=0.5), tokenizer)
    three = blended(proportions(corpora, web=0.7, books=0.1, wiki=0.2), tokenizer)
    alone = blended([CorpusSource(name="wiki", corpus=corpora["wiki"])], tokenizer)
    expected = rows_of(alone, "wiki", count=60)
    for data in (two, three):
        for found, wanted in zip(rows_of(data, "wiki", count=120), expected, strict=True):
            shorter = min(len(found), len(wanted))
            assert shorter > 20 and torch.equal(found[:shorter], wanted[:shorter])


def test_a_corpus_without_a_name_keeps_its_order(corpora: Corpora, tokenizer: Tokenizer) -> None:
    one = MaskedLMDataset(corpora["web"], tokenizer, max_seq_length=32, masking=MaskingConfig(), seed=5)
    expected = one.batch(20, 50)
    unnamed, named = (blended([CorpusSource(name=name, corpus=corpora["web"])], tokenizer) for name in ("", "web"))
    assert torch.equal(unnamed.batch(20, 50).input_ids, expected.input_ids)
    assert torch.equal(unnamed.batch(20, 50).labels, expected.labels)
    assert not torch.equal(named.batch(20, 50).labels, expected.labels)
    other_seed = blended([CorpusSource(name="web", corpus=corpora["web"])], tokenizer, seed=6)
    assert not torch.equal(other_seed.batch(20, 50).labels, named.batch(20, 50).labels)


@pytest.mark.parametrize("seed", [-1, 1 << 64])
def test_a_seed_is_in_its_range_with_and_without_names(corpora: Corpora, tokenizer: Tokenizer, seed: int) -> None:
    for name in ("", "web"):
        with pytest.raises(ConfigError, match=f"seed = {seed} is not within"):
            blended([CorpusSource(name=name, corpus=corpora["web"])], tokenizer, seed=seed)


def test_epochs_are_kept_beside_each_other(corpora: Corpora, tokenizer: Tokenizer) -> None:
    epochs = {"books": 3.0, "web": 0.5, "wiki": 1.0}
    mixture = blended(
        [CorpusSource(name=name, corpus=corpora[name], epochs=e) for name, e in epochs.items()], tokenizer
    ).mixture
    assert mixture.num_samples == 20 + 3 * 7 + 0.5 * 33
    for times in (1, 2, 1000):
        consumed = int(times * mixture.num_samples)
        for name, place in mixture.positions(consumed).items():
            assert abs(place.epoch * SIZES[name] + place.index - times * epochs[name] * SIZES[name]) < 2
    found = mixture.positions(2 * 115)  # four times everything: nothing is left of an epoch
    assert found["wiki"] == SourcePosition(epoch=4, index=0, num_samples=20) and found["books"].epochs == 12
    assert blended(proportions(corpora, wiki=1, web=2), tokenizer).mixture.num_samples is None


def test_a_source_without_a_sample_is_refused(
    corpora: Corpora, tokenizer: Tokenizer, token_file: TokenFile, tmp_path: Path
) -> None:
    short = write(tmp_path / "short.tokens", token_file, 0, 29)
    for share in ({"proportion": 0.5}, {"epochs": 1.0}):
        sources = [
            CorpusSource(name="wiki", corpus=corpora["wiki"], **share),
            CorpusSource(name="short", corpus=short, **share),
        ]
        with pytest.raises(DataError, match="short.tokens has 29 tokens, less than one sample"):
            blended(sources, tokenizer)
