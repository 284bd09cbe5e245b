"""The random numbers of masks: one stream per (seed, epoch, sample), for many samples at a time.

``mask_batch`` calls it. The streams are those of ``np.random.Philox``; only the bit generator is made once and moved
from sample to sample, which costs an eighth of making it anew.
"""

import numpy as np

from deberta_dist.data.sampler import check_seed

_STREAM = 0x6D61736B  # keeps these numbers apart from those of any other use of the seed


def sample_draws(count: int, *, seed: int, epochs: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """The first ``count`` numbers of every sample's stream.

    Philox is counter-based: (seed, epoch, sample) are its key and the upper half of its counter, so streams of
    different samples never meet, and any of them is reached at once.

    Args:
        count: numbers per sample.
        seed: seed of the run.
        epochs: integers [B], from 0.
        samples: integers [B], from 0.

    Returns:
        float64 [B, count], uniform in [0, 1): row i is ``Generator(Philox(key=[seed, "mask"], counter=[0, 0, epoch,
        sample])).random(count)``.

    Raises:
        ConfigError: ``seed`` is outside 0 .. 2**64 - 1.
    """
    philox = np.random.Philox(key=np.array([check_seed(seed), _STREAM], dtype=np.uint64))
    generator = np.random.Generator(philox)
    state = philox.state  # of a stream's begin: nothing is left over in its buffer
    counter = state["state"]["counter"]
    draws = np.empty((len(samples), count))
    for row, epoch, sample in zip(draws, epochs.tolist(), samples.tolist(), strict=True):
        counter[2], counter[3] = epoch, sample
        philox.state = state
        generator.random(out=row)
    return draws
