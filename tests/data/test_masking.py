"""Rates, replacement, whole words, where in the sequence targets lie, and purity."""

import hashlib
from collections.abc import Iterator

import numpy as np
import pytest

from deberta_dist.data.masking import MaskingConfig, mask_batch, sample_draws
from deberta_dist.errors import ConfigError
from deberta_dist.values import MASKING_METHODS

VOCAB = 2001
MASK = VOCAB - 1
SPECIAL = (0, 1, 2, 3, MASK)
LENGTH = 512
# Three quarters of the ids begin a word, as in English text.
STARTS = np.arange(VOCAB) % 4 != 3
STARTS[list(SPECIAL)] = True


def sequence(number: int, *, length: int = LENGTH) -> np.ndarray:
    body = np.random.default_rng(number).integers(4, MASK, length - 2)
    return np.concatenate(([1], body, [2]))


def mask_rows(
    ids: np.ndarray, config: MaskingConfig, *, samples: np.ndarray, seed: int = 5, starts: np.ndarray = STARTS
) -> tuple[np.ndarray, np.ndarray]:
    return mask_batch(
        ids,
        is_word_start=starts,
        special_ids=SPECIAL,
        mask_id=MASK,
        vocab_size=VOCAB,
        seed=seed,
        epochs=np.zeros_like(samples),
        samples=samples,
        config=config,
    )


def mask(ids: np.ndarray, config: MaskingConfig, *, sample: int = 0, seed: int = 5) -> tuple[np.ndarray, np.ndarray]:
    input_ids, labels = mask_rows(ids[None], config, samples=np.array([sample]), seed=seed)
    return input_ids[0], labels[0]


def many(config: MaskingConfig, *, count: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    ids = np.stack([sequence(number) for number in range(count)])
    return zip(ids, *mask_rows(ids, config, samples=np.arange(count)), strict=True)


def decile_shares(config: MaskingConfig, *, count: int) -> tuple[np.ndarray, float]:
    """Share of targets in each tenth of the 510 tokens between [CLS] and [SEP], and of all 512."""
    hits = sum((labels > 0).astype(float) for _, _, labels in many(config, count=count)) / count
    return hits[1:-1].reshape(10, 51).mean(axis=1), float(hits.mean())


@pytest.mark.parametrize(("max_ngram", "before_last", "last"), [(1, 0.1667, 0.010), (3, 0.142, 0.048)])
def test_official_has_the_published_histogram(max_ngram: int, before_last: float, last: float) -> None:
    shares, mean = decile_shares(MaskingConfig(method="official", max_ngram=max_ngram), count=4000)
    assert 77 / 512 - 1e-9 <= mean <= 0.1510
    assert np.all((shares[:8] > 0.158) & (shares[:8] < 0.170))
    assert shares[8] == pytest.approx(before_last, abs=0.004)
    assert shares[9] == pytest.approx(last, abs=0.004)


def test_official_takes_one_of_every_six_tokens_up_to_the_quota() -> None:
    config = MaskingConfig(method="official", max_ngram=1)
    for _, _, labels in many(config, count=50):
        windows = np.add.reduceat(labels[1:-1] > 0, np.arange(0, 510, 6))
        assert np.all(windows[:77] == 1) and windows[77:].sum() == 0


@pytest.mark.parametrize("max_ngram", [1, 2, 3, 5])
def test_uniform_is_flat(max_ngram: int) -> None:
    shares, mean = decile_shares(MaskingConfig(method="uniform", max_ngram=max_ngram), count=3000)
    assert 77 / 512 - 1e-9 <= mean <= 0.1520
    assert np.abs(shares - mean * 512 / 510).max() < 0.005


def test_uniform_is_flat_to_the_very_ends() -> None:
    hits = sum((labels > 0).astype(float) for _, _, labels in many(MaskingConfig(), count=6000)) / 6000
    assert np.abs(hits[[1, 2, 509, 510]] - 0.151).max() < 0.02


@pytest.mark.parametrize("method", MASKING_METHODS)
def test_counts(method: str) -> None:
    """round(0.15 * 512) = 77; the last word may go over, and only official may fall short."""
    for max_ngram, over in ((1, 0), (3, 15)):
        config = MaskingConfig(method=method, max_ngram=max_ngram)
        counts = [np.count_nonzero(labels) for _, _, labels in many(config, count=300)]
        assert max(counts) <= 77 + over
        assert min(counts) >= (77 if method == "uniform" or max_ngram == 1 else 60)
    config = MaskingConfig(method=method, max_ngram=1, max_targets=10)
    assert {np.count_nonzero(labels) for _, _, labels in many(config, count=20)} == {10}


def test_quota() -> None:
    config = MaskingConfig()
    assert [config.quota(n) for n in (1, 3, 10, 128, 512, 1024)] == [1, 1, 2, 19, 77, 154]
    assert MaskingConfig(max_targets=80).quota(1024) == 80


@pytest.mark.parametrize("method", MASKING_METHODS)
def test_replacement(method: str) -> None:
    kept = masked = random = special = 0
    for ids, input_ids, labels in many(MaskingConfig(method=method), count=1000):
        target = labels > 0
        assert np.array_equal(labels[target], ids[target])
        assert np.array_equal(input_ids[~target], ids[~target])
        masked += np.count_nonzero(input_ids[target] == MASK)
        kept += np.count_nonzero(input_ids[target] == ids[target])
        changed = input_ids[target & (input_ids != ids) & (input_ids != MASK)]
        random += changed.size
        special += np.count_nonzero(changed < 4)
        assert changed.size == 0 or (changed.min() >= 0 and changed.max() < VOCAB)
    total = masked + kept + random
    assert masked / total == pytest.approx(0.8, abs=0.005)
    assert kept / total == pytest.approx(0.1, abs=0.005)
    assert random / total == pytest.approx(0.1, abs=0.005)
    assert special > 0  # random ids come from the whole vocabulary, as published


@pytest.mark.parametrize("method", MASKING_METHODS)
def test_words_are_taken_whole_and_special_tokens_never(method: str) -> None:
    for number in range(300):
        ids = sequence(number)
        ids[[50, 51, 200]] = [3, MASK, 2]
        _, labels = mask(ids, MaskingConfig(method=method), sample=number)
        assert not np.any(labels[np.isin(ids, SPECIAL)])
        places = np.flatnonzero(~np.isin(ids, SPECIAL))
        word = np.cumsum(STARTS[ids[places]])
        taken = np.bincount(word, weights=labels[places] > 0)
        assert np.all((taken == 0) | (taken == np.bincount(word)))


def test_span_lengths() -> None:
    """Runs of words in the uniform method: 1, 2 and 3 in the ratio 6 : 3 : 2, where they do not touch."""
    starts = np.ones(VOCAB, dtype=bool)
    config = MaskingConfig(mask_probability=0.01, max_targets=1000)
    runs = np.zeros(20)
    ids = np.stack([sequence(number, length=10_000) for number in range(150)])
    for labels in mask_rows(ids, config, samples=np.arange(150), seed=1, starts=starts)[1]:
        edges = np.diff((labels > 0).astype(int), prepend=0, append=0)
        runs += np.bincount(np.flatnonzero(edges == -1) - np.flatnonzero(edges == 1), minlength=20)
    assert runs[1:4] / runs[1:4].sum() == pytest.approx([6 / 11, 3 / 11, 2 / 11], abs=0.02)
    assert runs[4:].sum() < 0.03 * runs.sum()


@pytest.mark.parametrize("method", MASKING_METHODS)
@pytest.mark.parametrize("max_ngram", [1, 3])
def test_short_sequences_have_a_target(method: str, max_ngram: int) -> None:
    config = MaskingConfig(method=method, max_ngram=max_ngram)
    for length in range(3, 40):
        for number in range(20):
            _, labels = mask(sequence(number, length=length), config, sample=number)
            assert np.count_nonzero(labels) >= 1
    for ids in (np.empty(0, dtype=np.int64), np.array([1, 2]), np.array([1, 3, MASK, 2, 0])):
        input_ids, labels = mask(ids, config)
        assert np.array_equal(input_ids, ids) and not labels.any()
    for probability in (1e-300, 1e-19, 0.001, 0.5, 0.9, 0.99):
        extreme = MaskingConfig(method=method, max_ngram=max_ngram, mask_probability=probability)
        _, labels = mask(sequence(1), extreme)
        assert 1 <= np.count_nonzero(labels) <= 510


def test_text_without_spaces_is_not_one_word() -> None:
    ids = np.full(LENGTH, 7)  # 7 continues a word
    ids[[0, -1]] = [1, 2]
    _, labels = mask(ids, MaskingConfig())
    assert np.count_nonzero(labels) == 77
    assert np.count_nonzero(mask(ids, MaskingConfig(method="official"))[1]) == 510  # as published


@pytest.mark.parametrize("method", MASKING_METHODS)
def test_long_sequences_cost_in_proportion(method: str) -> None:
    _, labels = mask(sequence(0, length=2_000_000), MaskingConfig(method=method))
    assert np.count_nonzero(labels) == pytest.approx(300_000, rel=0.01)


@pytest.mark.parametrize("method", MASKING_METHODS)
def test_a_mask_depends_on_seed_epoch_and_sample_only(method: str) -> None:
    ids = sequence(0)
    before = ids.copy()
    config = MaskingConfig(method=method)
    first = mask(ids, config, sample=9)
    for other in range(5):
        mask(ids, config, sample=other)
    np.random.seed(0)
    again = mask(ids.astype(np.uint16), config, sample=9)
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])
    assert np.array_equal(ids, before)
    assert not np.array_equal(first[1], mask(ids, config, sample=10)[1])
    assert not np.array_equal(first[1], mask(ids, config, sample=9, seed=6)[1])
    epochs, samples = np.divmod(np.arange(5 * 50), 50)
    draws = {x for s in range(5) for x in sample_draws(1, seed=s, epochs=epochs, samples=samples)[:, 0].tolist()}
    assert len(draws) == 5 * 5 * 50


@pytest.mark.parametrize(("method", "digest"), [("official", "76bd69ed35d41639"), ("uniform", "789d801aab43c2e2")])
def test_masks_never_change(method: str, digest: str) -> None:
    """A run resumed by a later version of the program, or of numpy, must see the same masks."""
    ids = 4 + np.arange(LENGTH) * 7919 % (MASK - 4)
    masked = mask(ids, MaskingConfig(method=method))
    found = hashlib.sha256(b"".join(array.astype("<i8").tobytes() for array in masked))
    assert found.hexdigest()[:16] == digest


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("method", "whole"),
        ("mask_probability", 0.0),
        ("mask_probability", 1.0),
        ("mask_probability", float("nan")),
        ("max_ngram", 0),
        ("mask_token_fraction", -0.1),
        ("mask_token_fraction", float("nan")),
        ("keep_fraction", 0.3),
        ("max_targets", 0),
    ],
)
def test_config_refuses(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        MaskingConfig(**{field: value})
