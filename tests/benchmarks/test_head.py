"""The head benchmark: all ways give one loss and one gradient, and chunks of the vocabulary need the least memory."""

import argparse

import pytest

from benchmarks import head
from deberta_dist.models import cross_entropy


def test_all_ways_agree_and_chunks_need_least(monkeypatch: pytest.MonkeyPatch) -> None:
    # A small part of the logits, as it is of a real vocabulary.
    monkeypatch.setattr(cross_entropy, "ELEMENTS_AT_ONCE_ON_CPU", 2**12)
    parser = argparse.ArgumentParser()
    head.add_arguments(parser)
    arguments = parser.parse_args(["--hidden-size", "64", "--vocabulary", "2003", "--length", "64", "--chunks", "3"])
    found = head.run(argparse.Namespace(**vars(arguments), rounds=1))
    assert found["agreement"].keys() == found["figures"].keys()
    peaks = {name: row["peak_bytes"] for name, row in found["figures"].items()}
    assert peaks[head.CHUNKED.format(3)] < peaks[head.OURS] < peaks[head.ALL_TOKENS]
