"""Near-duplicates: pairs of known similarity, order, short documents, and signatures that cannot be used."""

import hashlib
import random
import sys

import pytest

from deberta_dist.errors import ConfigError, DataError
from deberta_dist.preparation.filtering.near_duplicates import NearDuplicates, signature, signature_bytes

SHINGLES = 400
PAIRS = 200


def pair(jaccard: float, *, seed: int) -> tuple[str, str]:
    """Two documents of 400 distinct 5-grams each, of which c are shared, J = c / (800 - c)."""
    generator = random.Random(seed)
    first, second = ([f"w{generator.getrandbits(64):x}" for _ in range(SHINGLES + 4)] for _ in range(2))
    shared = round(2 * SHINGLES * jaccard / (1 + jaccard))
    return " ".join(first), " ".join(first[: shared + 4] + second[shared + 4 :])


def answers(texts: list[str], *, threshold: float = 0.8) -> list[bool]:
    near = NearDuplicates(threshold)
    return [near.is_duplicate(signature(text)) for text in texts]


@pytest.mark.parametrize(
    ("jaccard", "least", "most"),
    [
        # The estimate has a standard deviation of at most sqrt(J (1 - J) / 128), and 16 bands of 8 miss a pair with a
        # probability of (1 - J^8)^16.
        (0.95, 1.0, 1.0),  # 7 deviations above the threshold
        (0.9, 0.98, 1.0),  # 3.8 above; 0.01% missed
        (0.8, 0.3, 0.65),  # half of the estimates are below; 5% missed
        (0.65, 0.0, 0.01),  # 3.6 below
        (0.3, 0.0, 0.0),  # 12 below
    ],
)
def test_share_of_pairs_found(jaccard: float, least: float, most: float) -> None:
    texts = [text for seed in range(PAIRS) for text in pair(jaccard, seed=seed)]
    found = answers(texts)
    assert not any(found[::2])
    assert least * PAIRS <= sum(found[1::2]) <= most * PAIRS
    assert answers(texts) == found


def test_the_first_is_kept_and_a_duplicate_is_forgotten() -> None:
    first, near = pair(0.95, seed=1)
    other, near_other = pair(0.95, seed=2)
    assert answers([first, other, near, near_other, first]) == [False, False, True, True, True]
    assert answers([near, first]) == [False, True]
    num_chains = 0
    for seed in range(30):
        # A chain whose ends are less alike than the neighbours.
        one, two = pair(0.83, seed=seed)
        three = " ".join(["x", "y", "z"] * 10 + two.split()[30:])
        if answers([one, two])[1] and answers([two, three])[1] and not answers([one, three])[1]:
            assert answers([one, two, three]) == [False, True, False]
            num_chains += 1
    assert num_chains > 0


def test_form_of_the_text_does_not_matter() -> None:
    text, _ = pair(0.5, seed=3)
    assert signature(f"«{text.upper()}»\n".replace(" ", ", ")) == signature(text)
    repeated = "one two three four five six seven eight one two three four five six seven eight one two three four"
    assert signature(f"{repeated} five six seven eight") == signature(repeated)


def test_short_documents() -> None:
    assert answers(["one two three", "One, two: THREE!", "one two", "one", "one two three four five"]) == [
        False,
        True,
        False,
        False,
        False,
    ]
    assert answers(["", "...", "", "😀"]) == [False] * 4


def test_signature_is_the_same_everywhere() -> None:
    text, _ = pair(0.5, seed=4)
    made = signature(text)
    assert len(made) == len(signature("")) == len(signature("a")) == signature_bytes() == 669
    assert len(signature(text, num_permutations=64)) == signature_bytes(64)
    # If it is another, signatures stored by an earlier version are worthless.
    assert hashlib.sha256(made).hexdigest() == "9acebaf6ba900e7b81863282df89176d2126baa2b167e967021467573bc631e9"


def test_signatures_that_cannot_be_used() -> None:
    near = NearDuplicates(0.8)
    made = signature("one two three four five six")
    other_version = made.replace(b"RMinHash:2", b"RMinHash:1")
    assert other_version != made
    for wrong, reason in [
        (signature("one two", num_permutations=64), r"347 bytes, 669 were expected"),
        (made[:-1], r"668 bytes, 669 were expected"),
        (b"", "0 bytes"),
        (other_version, "unsupported RMinHash state version"),
        (bytes([100, 0]) + made[2:], "near-duplicate signature cannot be used"),
        (bytes(2) + made[2:], "near-duplicate signature cannot be used"),
    ]:
        with pytest.raises(DataError, match=reason):
            near.is_duplicate(wrong)
    assert not near.is_duplicate(made)
    assert near.is_duplicate(made)


@pytest.mark.parametrize(
    ("threshold", "num_permutations", "bands"),
    [(0.8, 128, 16), (0.9, 128, 16), (0.95, 128, 8), (0.5, 128, 32), (1.0, 128, 1), (0.001, 16, 16)],
)
def test_bands(threshold: float, num_permutations: int, bands: int) -> None:
    assert NearDuplicates(threshold, num_permutations=num_permutations).num_bands == bands


def test_settings_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    for threshold in (0.0, 1.1, float("nan")):
        with pytest.raises(ConfigError, match=f"threshold = {threshold}"):
            NearDuplicates(threshold)
    for num_permutations in (1, 5000, 12.0):
        with pytest.raises(ConfigError, match=f"num_permutations = {num_permutations} is not an integer from 2 to"):
            signature("a", num_permutations=num_permutations)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(ConfigError, match=r"near-duplicates need rensa.*pip install"):
        NearDuplicates(0.8)
