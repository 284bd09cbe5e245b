"""Whether two models differ by more than their seeds do. The only door to scipy."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

_DECIMALS = 9  # of percent: what differs by less differs by rounding


@dataclass(frozen=True)
class Comparison:
    """The scores of two sets of runs.

    Attributes:
        ours: Task scores in percent, run by run.
        theirs: Likewise.
        p_value: Two-sided probability of such a difference between equal means; None where it cannot be told.
        reason: Why it cannot, in words; empty otherwise.
    """

    ours: tuple[float, ...]
    theirs: tuple[float, ...]
    p_value: float | None
    reason: str = ""


def compare(ours: Sequence[float], theirs: Sequence[float]) -> Comparison:
    """Welch's t-test, t = (mean_1 - mean_2) / sqrt(s_1^2 / n_1 + s_2^2 / n_2), for runs of unequal variance.

    Args:
        ours: Scores of runs with different seeds, in percent.
        theirs: Likewise, of another model.

    Source: Welch 1947; the DeBERTa paper (arXiv 2006.03654), A.10, compares runs of five seeds.
    """
    sides = [[round(value, _DECIMALS) for value in side] for side in (ours, theirs)]
    if min(map(len, sides)) < 2:
        reason = f"two runs or more on each side are needed, {len(ours)} and {len(theirs)} are there"
        return Comparison(tuple(ours), tuple(theirs), None, reason)
    if all(len(set(side)) == 1 for side in sides):
        return Comparison(tuple(ours), tuple(theirs), None, "the runs of neither side differ among themselves")
    # It takes most of a second to import, and only comparisons need it.
    from scipy.stats import ttest_ind

    with warnings.catch_warnings():
        # One side without variance is what it warns of; the other has some.
        warnings.simplefilter("ignore", RuntimeWarning)
        p_value = float(ttest_ind(*sides, equal_var=False).pvalue)
    assert math.isfinite(p_value)
    return Comparison(tuple(ours), tuple(theirs), p_value)
