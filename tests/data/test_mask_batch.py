"""A batch is masked exactly as its sequences would be, one by one, from the same draws."""

import numpy as np
import pytest

from deberta_dist.data import masking
from deberta_dist.data.masking import MaskingConfig, mask_batch, sample_draws
from deberta_dist.errors import ConfigError
from deberta_dist.values import MASKING_METHODS
from tests.data.one_sequence import mask_sequence, sample_rng


def random_batch(random: np.random.Generator, *, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids [B, S] with special tokens and padding in them, lengths [B], and which ids of 40 begin a word."""
    num_rows = int(random.integers(1, 9))
    lowest = int(random.choice([0, 4]))  # 0: every tenth token is special
    ids = random.integers(lowest, 40, (num_rows, width))
    lengths = random.integers(1, width + 1, num_rows) if random.random() < 0.5 else np.full(num_rows, width)
    for row, length in zip(ids, lengths.tolist(), strict=True):
        row[length:] = 0
    if random.random() < 0.2:
        ids[0, : lengths[0]] = random.integers(0, 4, lengths[0])  # nothing to mask
    # 0: text without spaces, one word of a whole sequence.
    return ids, lengths, random.random(40) < random.choice([0.0, 0.03, 0.7, 1.0])


@pytest.mark.parametrize("max_ngram", [1, 3, 5])
@pytest.mark.parametrize("method", MASKING_METHODS)
def test_a_batch_equals_its_sequences(method: str, max_ngram: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(max_ngram)
    for number in range(150):
        # Blocks of one and of many rows.
        monkeypatch.setattr(masking, "_BLOCK_TOKENS", int(random.choice([1, 600, 1 << 15])))
        ids, lengths, starts = random_batch(random, width=int(random.choice([1, 2, 3, 18, 64, 200, 512])))
        config = MaskingConfig(
            method=method,
            max_ngram=max_ngram,
            mask_probability=float(random.choice([0.15, 0.01, 0.5, 0.99])),
            max_targets=[None, None, 1, 30][number % 4],
        )
        vocabulary = {"is_word_start": starts, "special_ids": (0, 1, 2, 3, 39), "mask_id": 39, "vocab_size": 40}
        seed = int(random.integers(0, 1 << 64, dtype=np.uint64))
        epochs, samples = random.integers(0, 1 << 40, (2, len(ids)))
        input_ids, labels = mask_batch(
            ids,
            **vocabulary,
            seed=seed,
            epochs=epochs,
            samples=samples,
            config=config,
            lengths=lengths if lengths.min() < ids.shape[1] else None,
        )
        for row, length in enumerate(lengths.tolist()):
            expected = mask_sequence(
                ids[row, :length],
                **vocabulary,
                rng=sample_rng(seed, epoch=int(epochs[row]), sample=int(samples[row])),
                config=config,
            )
            assert np.array_equal(input_ids[row, :length], expected[0])
            assert np.array_equal(labels[row, :length], expected[1])
            assert not input_ids[row, length:].any() and not labels[row, length:].any()


def test_padding_does_not_count_towards_the_quota() -> None:
    ids = np.zeros((2, 512), dtype=np.uint16)
    ids[0, :100] = ids[1] = 7
    _, labels = mask_batch(
        ids,
        is_word_start=np.ones(40, dtype=bool),
        special_ids=(0,),
        mask_id=39,
        vocab_size=40,
        seed=1,
        epochs=np.zeros(2, dtype=np.int64),
        samples=np.arange(2),
        config=MaskingConfig(),
        lengths=np.array([100, 512]),
    )
    assert np.count_nonzero(labels, axis=1).tolist() == [15, 77]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 701])
def test_draws_are_those_of_philox(count: int) -> None:
    """Whatever a sample before has left in the generator."""
    largest = (1 << 63) - 1
    samples = np.array([0, 1, 0, largest, 5])
    epochs = np.array([0, 0, 1, largest, 0])
    for seed in (0, (1 << 64) - 1):
        draws = sample_draws(count, seed=seed, epochs=epochs, samples=samples)
        for row, epoch, sample in zip(draws, epochs.tolist(), samples.tolist(), strict=True):
            assert np.array_equal(row, sample_rng(seed, epoch=epoch, sample=sample).random(count))
    with pytest.raises(ConfigError, match="seed = -1"):
        sample_draws(count, seed=-1, epochs=epochs, samples=samples)
