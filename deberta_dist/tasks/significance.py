"""Tests whether two models differ by more than their seeds do."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_DECIMALS = 9  # of percent: what differs by less differs by rounding


@dataclass(frozen=True)
class Comparison:
    """The scores of two sets of runs.

    Attributes:
        ours: Task scores in percent, run by run.
        theirs: Task scores of the other model's runs, in percent.
        p_value: Two-sided probability of such a difference between equal means; None where it cannot be computed.
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
    shares = [statistics.variance(side) / len(side) for side in sides]
    t = (statistics.fmean(sides[0]) - statistics.fmean(sides[1])) / math.sqrt(sum(shares))
    freedom = sum(shares) ** 2 / sum(share**2 / (len(side) - 1) for share, side in zip(shares, sides, strict=True))
    p_value = two_sided_p(t, freedom=freedom)
    assert math.isfinite(p_value)
    return Comparison(tuple(ours), tuple(theirs), p_value)


def two_sided_p(t: float, *, freedom: float) -> float:
    """Probability that Student's t is at least as far from 0: I_x(f / 2, 1 / 2) with x = f / (f + t^2).

    I is the regularised incomplete beta function, by its continued fraction (Press et al., Numerical Recipes, 6.4, evaluated by
    Lentz's method). The tests compare it with scipy.

    Args:
        t: Welch's t statistic, of either sign.
        freedom: Degrees of freedom, positive; need not be whole.
    """
    square = t * t
    x, complement = freedom / (freedom + square), square / (freedom + square)
    a, b = freedom / 2, 0.5
    if x < (a + 1) / (a + b + 2):
        return _beta_term(a, b, x, complement)
    # The fraction converges fast on the other side alone: I_x(a, b) = 1 - I_{1 - x}(b, a).
    return 1 - _beta_term(b, a, complement, x)


def _beta_term(a: float, b: float, x: float, complement: float) -> float:
    """I_x(a, b); ``complement`` is 1 - x, which would lose its digits next to 1."""
    if x == 0:
        return 0.0
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(complement)
    tiny = 1e-300
    c, d = 1.0, 1 / max(1 - (a + b) * x / (a + 1), tiny)
    fraction = d
    for m in range(1, 1000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / ((1 + term * d) or tiny)
            c = (1 + term / c) or tiny
            fraction *= c * d
        if abs(c * d - 1) < 1e-16:
            break
    return math.exp(log_front) * fraction / a
