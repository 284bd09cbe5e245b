"""The learning rate at every step."""

from deberta_dist.training.lr_schedule import learning_rate


def test_learning_rate_climbs_to_the_peak_and_falls_to_nothing() -> None:
    rates = [learning_rate(step, peak=2.0, warmup_steps=4, max_steps=12) for step in range(13)]
    assert rates == [0.5, 1.0, 1.5, 2.0, 2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25, 0.0]


def test_learning_rate_without_warmup_starts_at_the_peak() -> None:
    assert [learning_rate(step, peak=1.0, warmup_steps=0, max_steps=4) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]


def test_learning_rate_of_nothing_but_warmup() -> None:
    assert [learning_rate(step, peak=1.0, warmup_steps=2, max_steps=2) for step in range(2)] == [0.5, 1.0]
