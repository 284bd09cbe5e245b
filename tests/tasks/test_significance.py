"""Welch's test against a published example, and where it has nothing to say."""

import math

import pytest

from deberta_dist.tasks.significance import compare, two_sided_p

# Example 1 of "Welch's t-test" in Wikipedia: t = -2.46, 25.0 degrees of freedom, P = 0.021.
A = (27.5, 21.0, 19.0, 23.6, 17.0, 17.9, 16.9, 20.1, 21.9, 22.6, 23.1, 19.6, 19.0, 21.7, 21.4)
B = (27.1, 22.0, 20.8, 23.4, 23.4, 23.5, 25.8, 22.0, 24.8, 20.2, 21.9, 22.1, 22.9, 20.5, 24.4)


def test_a_published_example() -> None:
    found = compare(A, B)
    assert found.p_value == pytest.approx(0.021, abs=5e-4) and found.reason == ""
    assert (found.ours, found.theirs) == (A, B) and compare(B, A).p_value == pytest.approx(found.p_value)


def test_by_hand() -> None:
    # Equal variances 2 / 3 and sizes: t = -2 / sqrt(4 / 3 / 3) = -3 with 4 degrees of freedom; of these the distribution
    # is 1/2 + 3/8 u (1 - u^2 / 12), u = t / sqrt(1 + t^2 / 4).
    scale = math.sqrt(2 / 3)
    ours, theirs = ([(middle + step) for step in (-scale, 0.0, scale)] for middle in (90.0, 92.0))
    u = 3 / math.sqrt(1 + 9 / 4)
    assert compare(ours, theirs).p_value == pytest.approx(2 * (1 - (0.5 + 3 / 8 * u * (1 - u * u / 12))))


def test_scipy_says_the_same() -> None:
    student = pytest.importorskip("scipy.stats", reason="scipy is not installed: an oracle of the tests alone").t
    for freedom in (1.0, 1.3, 2.0, 3.7, 8.0, 25.5, 200.0):
        for t in (0.0, 1e-6, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 50.0):
            assert two_sided_p(t, freedom=freedom) == pytest.approx(2 * student.sf(t, freedom), rel=1e-9), (t, freedom)
            assert two_sided_p(-t, freedom=freedom) == two_sided_p(t, freedom=freedom)


@pytest.mark.filterwarnings("error")
def test_one_side_without_variance() -> None:
    # The other side's three runs alone: t = -2 / sqrt(1 / 3), 2 degrees of freedom, p = 1 - t / sqrt(2 + t^2).
    t = 2 * math.sqrt(3)
    assert compare([90.0] * 3, [91.0, 92.0, 93.0]).p_value == pytest.approx(1 - t / math.sqrt(2 + t * t))


@pytest.mark.parametrize(
    ("ours", "theirs", "reason"),
    [
        ([90.0], [91.0, 92.0, 93.0], "two runs or more on each side are needed, 1 and 3 are there"),
        ([90.0, 91.0], [91.0], "two runs or more on each side are needed, 2 and 1 are there"),
        ([90.0, 90.0], [90.0, 90.0], "the runs of neither side differ among themselves"),
        ([90.0, 90.0], [91.0, 91.0, 91.0], "the runs of neither side differ among themselves"),
        ([0.1 + 0.2, 0.3], [91.0, 91.0], "the runs of neither side differ among themselves"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_what_cannot_be_told_is_said(ours: list[float], theirs: list[float], reason: str) -> None:
    found = compare(ours, theirs)
    assert found.p_value is None and found.reason == reason
