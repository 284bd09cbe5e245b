"""Batches by position: equal however they are split, different per epoch, refused where files disagree."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from deberta_dist.data.loader import MaskedLMDataset, check_vocabulary
from deberta_dist.data.masking import MaskingConfig
from deberta_dist.data.prefetch import Prefetcher
from deberta_dist.data.token_corpus import open_corpus
from deberta_dist.data.token_file import TokenFile
from deberta_dist.data.token_writer import TokenFileWriter
from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.errors import ConfigError, DataError


def data_of(file: TokenFile, tokenizer: Tokenizer, *, length: int = 64, seed: int = 1, shuffle: bool = True) -> MaskedLMDataset:
    corpus, masking = open_corpus(file.path), MaskingConfig()
    return MaskedLMDataset(corpus, tokenizer, max_seq_length=length, masking=masking, seed=seed, shuffle=shuffle)


def test_sequences_are_the_file_cut_into_samples(token_file: TokenFile, tokenizer: Tokenizer) -> None:
    data = data_of(token_file, tokenizer, shuffle=False)
    assert data.num_samples == token_file.num_tokens // 62
    assert data.num_dropped_tokens == token_file.num_tokens % 62
    batch = data.batch(0, data.num_samples)
    for tensor in (batch.input_ids, batch.attention_mask, batch.labels):
        assert tensor.shape == (data.num_samples, 64) and tensor.dtype == torch.int64
    assert bool((batch.attention_mask == 1).all())
    original = torch.where(batch.labels > 0, batch.labels, batch.input_ids)
    assert bool((original[:, 0] == tokenizer.cls_id).all())
    assert bool((original[:, -1] == tokenizer.sep_id).all())
    assert np.array_equal(original[:, 1:-1].reshape(-1).numpy(), token_file.ids[: data.num_samples * 62])
    assert 0.14 < float((batch.labels > 0).float().mean()) < 0.18


@pytest.mark.parametrize("shuffle", [True, False])
def test_any_split_of_a_range_gives_the_same_batches(token_file: TokenFile, tokenizer: Tokenizer, shuffle: bool) -> None:
    data = data_of(token_file, tokenizer, shuffle=shuffle)
    start, count = data.num_samples - 7, 24  # across the end of an epoch
    whole = data.batch(start, count)
    fresh = data_of(TokenFile(token_file.path), Tokenizer(tokenizer.path), shuffle=shuffle)
    for size in (1, 2, 3, 8, 24):
        parts = [fresh.batch(start + at, size) for at in reversed(range(0, count, size))][::-1]
        assert torch.equal(whole.input_ids, torch.cat([part.input_ids for part in parts]))
        assert torch.equal(whole.labels, torch.cat([part.labels for part in parts]))


def test_an_epoch_has_every_sample_once_and_the_next_is_different(token_file: TokenFile, tokenizer: Tokenizer) -> None:
    data = data_of(token_file, tokenizer)
    size = data.num_samples
    epochs = [data.samples_at(epoch * size, size) for epoch in range(2)]
    for number, epoch in enumerate(epochs):
        assert {e for e, _ in epoch} == {number}
        assert sorted(sample for _, sample in epoch) == list(range(size))
    assert [s for _, s in epochs[0]] != [s for _, s in epochs[1]]
    assert data.samples_at(0, 3 * size)[size : 2 * size] == epochs[1]


def test_masks_differ_per_epoch_and_seed(token_file: TokenFile, tokenizer: Tokenizer) -> None:
    data = data_of(token_file, tokenizer, shuffle=False)
    first, second = data.batch(0, 4), data.batch(data.num_samples, 4)
    other_seed = data_of(token_file, tokenizer, shuffle=False, seed=2).batch(0, 4)
    for batch in (second, other_seed):
        assert not torch.equal(first.labels, batch.labels)
        originals = [torch.where(b.labels > 0, b.labels, b.input_ids) for b in (first, batch)]
        assert torch.equal(*originals)


def test_tensors_can_be_written_and_do_not_reach_the_file(token_file: TokenFile, tokenizer: Tokenizer) -> None:
    data = data_of(token_file, tokenizer)
    first = data.batch(0, 2)
    kept = first.input_ids.clone()
    first.input_ids.zero_()
    assert torch.equal(data.batch(0, 2).input_ids, kept)


def test_refusals(token_file: TokenFile, tokenizer: Tokenizer, other_tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="was made with the tokenizer"):
        data_of(token_file, other_tokenizer)
    with pytest.raises(DataError, match="less than one sample"):
        data_of(token_file, tokenizer, length=token_file.num_tokens + 3)
    assert data_of(token_file, tokenizer, length=token_file.num_tokens + 2).num_samples == 1
    with pytest.raises(ConfigError, match="max_seq_length = 2"):
        data_of(token_file, tokenizer, length=2)
    with pytest.raises(ConfigError, match="seed = -1"):
        data_of(token_file, tokenizer, seed=-1)


def test_check_vocabulary(tokenizer: Tokenizer) -> None:
    check_vocabulary(tokenizer, 1001)
    check_vocabulary(tokenizer, 1024)
    with pytest.raises(DataError, match="vocab_size = 1000 .* less than the 1001 tokens"):
        check_vocabulary(tokenizer, 1000)


def test_a_damaged_id_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.tokens"
    with TokenFileWriter(path, tokenizer_sha256=tokenizer.sha256, vocab_size=tokenizer.num_tokens) as writer:
        writer.add_document([5] * 30)
    content = bytearray(path.read_bytes())
    content[4096 + 7] = 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match="is damaged: sample 0 holds the id 65285 of 1001"):
        data_of(TokenFile(path), tokenizer, length=12, shuffle=False).batch(0, 1)


def test_prefetcher_keeps_order_and_depth() -> None:
    made: list[int] = []
    with Prefetcher(lambda number: made.append(number) or number, start=3, depth=2) as batches:
        deadline = time.monotonic() + 5
        while len(made) < 2 and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.05)
        assert made == [3, 4]  # no further than depth
        assert [next(batches) for _ in range(20)] == list(range(3, 23))
    assert list(Prefetcher(lambda number: number * number, start=2, depth=3, stop=6)) == [4, 9, 16, 25]


def test_prefetcher_gives_the_loaders_batches(token_file: TokenFile, tokenizer: Tokenizer) -> None:
    data = data_of(token_file, tokenizer)
    with Prefetcher(lambda step: data.batch(step * 4, 4), start=5, depth=2) as batches:
        for step in range(5, 9):
            assert torch.equal(next(batches).labels, data.batch(step * 4, 4).labels)


def test_prefetcher_raises_in_its_place() -> None:
    def make(number: int) -> int:
        if number == 3:
            raise DataError("sample 3 is damaged")
        return number

    before = threading.active_count()
    batches = Prefetcher(make, start=0, depth=8)
    assert [next(batches) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match="sample 3 is damaged"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)
    assert threading.active_count() == before


def test_prefetcher_closes_while_full_or_waiting() -> None:
    before = threading.active_count()
    full = Prefetcher(lambda number: number, start=0, depth=1)
    next(full)
    full.close()
    full.close()
    assert next(full, None) is None
    with pytest.raises(RuntimeError, match="elsewhere"), Prefetcher(lambda n: n, start=0, depth=4):
        raise RuntimeError("elsewhere")
    gate = threading.Event()
    slow = Prefetcher(lambda number: gate.wait(10), start=0, depth=1)
    closing = threading.Thread(target=slow.close)
    closing.start()
    assert next(slow, None) is None  # a waiting consumer is let go
    gate.set()
    closing.join(5)
    assert threading.active_count() == before


def test_waiting_is_told_where_making_is_slower_than_using() -> None:
    def make(number: int) -> int:
        if number == 2:
            time.sleep(0.3)
        return number

    waited = []
    with Prefetcher(make, start=0, depth=1, stop=4) as batches:
        for _ in batches:
            waited.append(batches.waited_seconds)
            time.sleep(0.05)
    assert waited[2] > 0.1 and waited[2] == max(waited)


@pytest.mark.parametrize("length", [3, 5, 64, 3000])
def test_documents_can_be_kept_apart(token_file: TokenFile, tokenizer: Tokenizer, length: int) -> None:
    data = MaskedLMDataset(
        open_corpus(token_file.path),
        tokenizer,
        max_seq_length=length,
        masking=MaskingConfig(),
        seed=1,
        shuffle=False,
        document_boundaries=True,
    )
    offsets = token_file.document_offsets
    stream = [
        (int(token), number)
        for number in range(token_file.num_documents)
        for token in [*token_file.ids[offsets[number] : offsets[number + 1]], tokenizer.sep_id]
    ]
    assert (data.num_samples, data.num_dropped_tokens) == divmod(len(stream), length - 2)
    step = max(1, data.num_samples // 40)
    for sample in {*range(0, data.num_samples, step), data.num_samples - 1}:
        batch = data.batch(sample, 1)
        ids = torch.where(batch.labels > 0, batch.labels, batch.input_ids)[0].tolist()
        window = stream[sample * (length - 2) : (sample + 1) * (length - 2)]
        assert ids == [tokenizer.cls_id, *(token for token, _ in window), tokenizer.sep_id]
        numbers = [1 + number - window[0][1] for _, number in window]
        assert batch.document_ids is not None
        assert batch.document_ids[0].tolist() == [numbers[0], *numbers, numbers[-1]]


def test_many_short_documents_share_a_sample(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with TokenFileWriter(
        tmp_path / "short.tokens", tokenizer_sha256=tokenizer.sha256, vocab_size=tokenizer.num_tokens
    ) as writer:
        writer.add_documents(np.full(40, 7), np.ones(40, np.int64))
    data = MaskedLMDataset(
        open_corpus(tmp_path / "short.tokens"),
        tokenizer,
        max_seq_length=22,
        masking=MaskingConfig(),
        seed=1,
        shuffle=False,
        document_boundaries=True,
    )
    assert data.num_samples == 4
    batch = data.batch(1, 1)
    assert batch.document_ids is not None
    assert batch.document_ids[0].tolist() == [1, *(1 + place // 2 for place in range(20)), 10]
