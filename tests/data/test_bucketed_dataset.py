"""Dynamic batching: every piece once per epoch whatever the ranks, steps of one shape in exact proportion."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from deberta_dist.data.bucketed_dataset import BucketedDataset
from deberta_dist.data.chunks import open_chunks
from deberta_dist.data.masking import MaskingConfig
from deberta_dist.data.sources import CorpusSource
from deberta_dist.data.token_corpus import TokenCorpus
from deberta_dist.data.token_file import TokenFile
from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.errors import DataError
from tests.data.conftest import corpus_of

LENGTHS = (8, 16, 32)
SAMPLES = 6  # a step: 24, 12 or 6 sequences


@pytest.fixture
def corpus(tokenizer: Tokenizer, tmp_path: Path) -> TokenCorpus:
    """120 documents of 1 to 70 tokens."""
    return corpus_of(tmp_path / "mixed.tokens", tokenizer, np.random.default_rng(3).integers(1, 71, 120))


@pytest.fixture
def sources(corpus: TokenCorpus, tokenizer: Tokenizer, tmp_path: Path) -> list[CorpusSource]:
    """A source of long documents read twice while one of mixed documents is read once."""
    long = corpus_of(tmp_path / "long.tokens", tokenizer, np.random.default_rng(4).integers(20, 90, 50))
    return [CorpusSource(name="mixed", corpus=corpus, epochs=1), CorpusSource(name="long", corpus=long, epochs=2)]


def bucketed(
    sources: list[CorpusSource] | TokenCorpus, tokenizer: Tokenizer, *, lengths: tuple[int, ...] = LENGTHS
) -> BucketedDataset:
    sources = sources if isinstance(sources, list) else [CorpusSource(corpus=sources)]
    return BucketedDataset(sources, tokenizer, lengths=lengths, samples_per_step=SAMPLES, masking=MaskingConfig(), seed=5)


def text_of(batch) -> list[tuple[int, ...]]:
    """Tokens of every sequence, as they were before masking, without special ones and padding."""
    original = torch.where(batch.labels > 0, batch.labels, batch.input_ids)
    lengths = batch.attention_mask.sum(dim=1).tolist()
    return [tuple(row[1 : length - 1].tolist()) for row, length in zip(original, lengths, strict=True)]


def pieces_of(corpus: TokenCorpus) -> Counter:
    """Documents, and pieces of 30 tokens of those that are longer, and the rest: the plain way."""
    offsets, found = corpus.document_offsets(0, corpus.num_documents + 1).tolist(), Counter()
    for start, stop in zip(offsets[:-1], offsets[1:], strict=True):
        found.update(tuple(corpus.read(at, min(at + 30, stop)).tolist()) for at in range(start, stop, 30))
    return found


def test_every_piece_comes_once_per_epoch_and_nothing_is_lost(corpus: TokenCorpus, tokenizer: Tokenizer) -> None:
    data = bucketed(corpus, tokenizer)
    (sizes,) = data.mixture.sizes
    assert any(room % (SAMPLES * 32) for room in sizes.room), "otherwise every epoch ends with a step"
    # In so many steps all buckets are read SAMPLES x 32 / gcd times: the shares are exact, nothing is left over.
    gcd = np.gcd.reduce([*sizes.room, SAMPLES * 32])
    steps, times = int(sum(sizes.room) // gcd), int(SAMPLES * 32 // gcd)
    read, shapes = Counter(), Counter()
    for step in range(steps):
        batch = data.batch(step * SAMPLES, SAMPLES)
        read.update(text_of(batch))
        shapes[tuple(batch.input_ids.shape)] += 1
        for bucket, share in enumerate(data.mixture.bucket_shares):
            shape = (SAMPLES * 32 // LENGTHS[bucket], LENGTHS[bucket])
            assert abs(shapes[shape] - float(share) * (step + 1)) < 2, "no bucket runs ahead"
    assert read == Counter({piece: count * times for piece, count in pieces_of(corpus).items()})
    assert [shapes[SAMPLES * 32 // length, length] for length in LENGTHS] == [room // gcd for room in sizes.room]
    assert all((place.epoch, place.index) == (times, 0) for place in data.mixture.positions(steps * SAMPLES).values())


def test_what_does_not_fill_a_step_begins_the_next(corpus: TokenCorpus, tokenizer: Tokenizer) -> None:
    """Bucket by bucket the first epochs, in order: each has every piece once, and none has the order of another."""
    data = bucketed(corpus, tokenizer)
    (sizes,) = data.mixture.sizes
    assert sum(room % (SAMPLES * 32) > 0 for room in sizes.room) >= 2
    read: dict[int, list[tuple[int, ...]]] = {length: [] for length in LENGTHS}
    for step in range(90):
        batch = data.batch(step * SAMPLES, SAMPLES)
        read[batch.input_ids.shape[1]] += text_of(batch)
    for length, size in zip(LENGTHS, sizes.num_chunks, strict=True):
        epochs = [read[length][start : start + size] for start in range(0, 3 * size, size)]
        assert len(epochs[2]) == size and sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
        assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_any_number_of_ranks_reads_the_same_steps(sources: list[CorpusSource], tokenizer: Tokenizer, parts: int) -> None:
    data, fresh = bucketed(sources, tokenizer), bucketed(sources[::-1], tokenizer)
    shapes = set()
    for step in range(300, 330):
        whole, count = data.batch(step * SAMPLES, SAMPLES), SAMPLES // parts
        split = [fresh.batch(step * SAMPLES + part * count, count) for part in range(parts)]
        for name in ("input_ids", "attention_mask", "labels"):
            assert torch.equal(getattr(whole, name), torch.cat([getattr(batch, name) for batch in split]))
        shapes.add(tuple(whole.input_ids.shape))
    assert shapes == {(SAMPLES * 32 // length, length) for length in LENGTHS}


def test_sequences_are_masked_and_padded_up_to_their_bucket(corpus: TokenCorpus, tokenizer: Tokenizer) -> None:
    data = bucketed(corpus, tokenizer)
    for step in range(40):
        batch = data.batch(step * SAMPLES, SAMPLES)
        original = torch.where(batch.labels > 0, batch.labels, batch.input_ids)
        width = batch.input_ids.shape[1]
        shorter = ([0, *LENGTHS])[LENGTHS.index(width)]
        for row, mask, length in zip(original, batch.attention_mask, batch.attention_mask.sum(dim=1).tolist(), strict=True):
            assert shorter < length <= width, "a sequence is in the smallest bucket that holds it"
            assert mask[:length].all() and not mask[length:].any() and not row[length:].any()
            assert (row[0], row[length - 1]) == (tokenizer.cls_id, tokenizer.sep_id)
        assert bool(((batch.labels > 0).sum(dim=1) > 0).all())
        assert not bool(batch.labels[batch.attention_mask == 0].any())


def test_the_mask_of_a_piece_depends_on_its_epoch_and_not_on_the_buckets(corpus: TokenCorpus, tokenizer: Tokenizer) -> None:
    def masks(lengths: tuple[int, ...], steps: int) -> dict[tuple[int, ...], list[tuple[int, ...]]]:
        """Targets of each piece, epoch after epoch."""
        data, seen = bucketed(corpus, tokenizer, lengths=lengths), {}
        for step in range(steps):
            batch = data.batch(step * SAMPLES, SAMPLES)
            for text, labels in zip(text_of(batch), batch.labels, strict=True):
                seen.setdefault(text, []).append(tuple(labels[: len(text) + 2].tolist()))
        return seen

    three, one = masks(LENGTHS, 120), masks((32,), 120)
    several = {text for text, count in pieces_of(corpus).items() if count == 1} & three.keys() & one.keys()
    assert len(several) > 100
    assert all(three[text][:2] == one[text][:2] for text in several)
    assert any(three[text][0] != three[text][1] for text in several)


def test_sources_keep_their_share_of_the_tokens_in_every_bucket(sources: list[CorpusSource], tokenizer: Tokenizer) -> None:
    data = bucketed(sources, tokenizer)
    long, mixed = data.mixture.sizes
    total = 2 * sum(long.room) + sum(mixed.room)
    assert data.mixture.shares == pytest.approx([2 * sum(long.room) / total, sum(mixed.room) / total])
    steps = round(10 * total / (SAMPLES * 32))
    places = data.mixture.positions(steps * SAMPLES)
    assert places.keys() == {f"{name}/{length}" for name in ("long", "mixed") for length in LENGTHS}
    for name, place in places.items():
        # Ten times through one and twenty times through the other, up to the sequences of a step.
        wanted = (20 if name.startswith("long") else 10) * place.num_samples
        assert abs(place.epochs * place.num_samples - wanted) < 2 * SAMPLES * 32 / int(name.split("/")[1])
    # What one source reads, and with which masks, is not moved by the other.
    alone, seen = bucketed(sources[:1], tokenizer), {False: {}, True: {}}
    for is_alone, some in ((False, data), (True, alone)):
        own = pieces_of(sources[0].corpus)
        for step in range(100):
            batch = some.batch(step * SAMPLES, SAMPLES)
            for text, labels in zip(text_of(batch), batch.labels, strict=True):
                if text in own:
                    seen[is_alone].setdefault(batch.input_ids.shape[1], []).append(labels.tolist())
    for length in LENGTHS:
        count = min(len(seen[True][length]), len(seen[False][length]))
        assert count > 10 and seen[True][length][:count] == seen[False][length][:count]


def test_a_foreign_tokenizer_or_damage_is_refused(
    corpus: TokenCorpus, tokenizer: Tokenizer, other_tokenizer: Tokenizer
) -> None:
    with pytest.raises(DataError, match="was made with the tokenizer"):
        bucketed(corpus, other_tokenizer)
    assert not list(corpus.path.parent.glob("*.pieces")), "nothing is made for a run that cannot be"
    data = bucketed(corpus, tokenizer)
    path = open_chunks(corpus, LENGTHS).path
    entries = path.read_bytes()[4096:]
    with open(path, "r+b") as file:
        file.seek(4096)
        file.write(b"".join(entries[at : at + 2] + b"\xff" * 6 for at in range(0, len(entries), 8)))
    with pytest.raises(DataError, match=r"pieces is damaged: a chunk ends behind the text; remove it"):
        data.batch(0, SAMPLES)
    path.unlink()
    with open(corpus.path, "r+b") as file:
        file.seek(TokenFile(corpus.path).ids.offset)
        file.write(b"\xff" * 2 * corpus.num_tokens)
    with pytest.raises(DataError, match=r"mixed\.tokens is damaged: .* holds the id 65535"):
        bucketed(corpus, tokenizer).batch(0, SAMPLES)
