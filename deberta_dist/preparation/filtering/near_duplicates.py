"""Near-duplicates by MinHash: of documents that share most word 5-grams, only the first stays. The only door to rensa.

Corpus preparation makes a signature of every document and asks ``NearDuplicates`` for one after the other, in the order of
the input. A signature is bytes that any process can make; the answers are one process's. Memory is that of the second
step, and grows with the documents kept: see there.
"""

import functools
from types import ModuleType

from deberta_dist.errors import ConfigError, DataError
from deberta_dist.preparation.filtering.words import ngram_hashes, split_words

SHINGLE_WORDS = 5
MAX_PERMUTATIONS = 4096
_SEED = 1
_LENGTH_BYTES = 2
_LEAST_RECALL = 0.85


def signature_bytes(num_permutations: int = 128) -> int:
    """Bytes of every signature: 669 for 128 permutations.

    Raises:
        ConfigError: rensa is not installed, or num_permutations is out of its range.
    """
    _rensa(num_permutations)
    return _signature_bytes(num_permutations)


@functools.cache
def _signature_bytes(num_permutations: int) -> int:
    # No sketch takes more room than that of an empty set: all its numbers are the largest there are.
    return _LENGTH_BYTES + len(_rensa(num_permutations).RMinHash(num_permutations, _SEED).__getstate__())


def signature(text: str, *, num_permutations: int = 128) -> bytes:
    """MinHash of the set of word 5-grams of a document, words as in ``split_words``.

    It depends on neither process nor machine, only on the version of rensa's algorithm, which is in it and checked,
    and on Python's Unicode database. Case, width and punctuation do not matter, nor how often a 5-gram occurs. A
    document of 1 to 4 words is one n-gram of all its words, and near only the same words. One without any word
    (punctuation, emoji) gets a signature that is near nothing.

    Args:
        num_permutations: numbers of a signature; the standard deviation of an estimated similarity J is at most
            sqrt(J (1 - J) / num_permutations): 0.035 for 0.8 with 128.

    Returns:
        ``signature_bytes(num_permutations)`` bytes.

    Raises:
        ConfigError: rensa is not installed, or num_permutations is out of its range.
    """
    rensa = _rensa(num_permutations)
    size = _signature_bytes(num_permutations)
    words = split_words(text).hashes
    if not len(words):
        return bytes(size)
    shingles = ngram_hashes(words, n=min(SHINGLE_WORDS, len(words)))
    sketch = rensa.RMinHash(num_permutations, _SEED)
    sketch.update(shingles.astype("<u8").view("V8").tolist())
    state = sketch.__getstate__()
    return (len(state).to_bytes(_LENGTH_BYTES, "little") + state).ljust(size, b"\0")


class NearDuplicates:
    """Which documents are near an earlier one that was kept; their signatures have to come in the order of the input.

    Candidates share one of ``num_bands`` bands of their signatures. Of these, a duplicate has an estimated similarity
    of at least the threshold. The number of bands is the smallest with which a pair right at the threshold becomes a
    candidate with a probability of 85% or more; of more similar pairs fewer are missed. With threshold 0.8 and 128
    permutations there are 16 bands of 8: 95% at similarity 0.8, 99.98% at 0.9.

    Memory for every document kept, 128 permutations, measured with 20 thousand to a million: 2.1 to 3.1 KB with 16
    bands, as tables double when they are full. 40 million documents kept: about 105 GB, in one process.

    Attributes:
        num_bands: bands that a signature is cut into; more bands miss fewer pairs and cost more memory.
    """

    num_bands: int

    def __init__(self, threshold: float = 0.8, *, num_permutations: int = 128) -> None:
        """An empty memory.

        Args:
            threshold: least Jaccard similarity of the sets of word 5-grams, above 0 and up to 1.
            num_permutations: as the signatures were made with.

        Raises:
            ConfigError: threshold or num_permutations is out of its range, or rensa is not installed.
        """
        rensa = _rensa(num_permutations)
        if not 0 < threshold <= 1:
            raise ConfigError(f"near-duplicates: threshold = {threshold} is not above 0 and at most 1 (usually 0.8)")
        self.num_bands = _num_bands(threshold, num_permutations=num_permutations)
        self._of_nothing = bytes(signature_bytes(num_permutations))
        self._sketch = rensa.RMinHash(num_permutations, _SEED)
        self._kept = rensa.RMinHashDeduplicator(threshold, num_permutations, True, self.num_bands, _SEED)

    def is_duplicate(self, signature: bytes) -> bool:
        """Whether an earlier kept document is near this one; if none is, this one is kept and remembered.

        Args:
            signature: of ``signature``, with the same number of permutations.

        Raises:
            DataError: it is not such a signature, or one of another version of rensa.
        """
        if signature == self._of_nothing:
            return False
        try:
            if len(signature) != len(self._of_nothing):
                raise ValueError(f"it has {len(signature)} bytes, {len(self._of_nothing)} were expected")
            length = int.from_bytes(signature[:_LENGTH_BYTES], "little")
            self._sketch.__setstate__(signature[_LENGTH_BYTES : _LENGTH_BYTES + length])
            return not self._kept.add(str(self._kept.len()), self._sketch)
        except ValueError as error:
            raise DataError(
                f"a near-duplicate signature cannot be used ({error}): compute the signatures again, with the installed "
                "version of rensa and the same number of permutations"
            ) from error


def _num_bands(threshold: float, *, num_permutations: int) -> int:
    """The fewest bands b of r = num_permutations / b numbers with 1 - (1 - threshold^r)^b of at least 85%."""
    for bands in range(1, num_permutations):
        if num_permutations % bands == 0:
            missed = (1 - threshold ** (num_permutations // bands)) ** bands
            if 1 - missed >= _LEAST_RECALL:
                return bands
    return num_permutations


def _rensa(num_permutations: int) -> ModuleType:
    """The library, once it is sure that it can be asked for so many permutations."""
    if not (type(num_permutations) is int and 2 <= num_permutations <= MAX_PERMUTATIONS):
        raise ConfigError(
            f"near-duplicates: num_permutations = {num_permutations!r} is not an integer from 2 to {MAX_PERMUTATIONS} "
            "(usually 128)"
        )
    try:
        import rensa
    except ImportError:
        raise ConfigError('near-duplicates need rensa, which is not installed: pip install "deberta_dist[data]"') from None
    return rensa
