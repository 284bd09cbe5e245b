"""The benchmarks that can be asked for; the one place that lists them."""

from collections.abc import Mapping

from deberta_dist.tasks.base import Benchmark
from deberta_dist.tasks.superglue.benchmark import SUPERGLUE

BENCHMARKS: Mapping[str, Benchmark] = {benchmark.name: benchmark for benchmark in (SUPERGLUE,)}
DEFAULT = SUPERGLUE
"""The one that is meant where none is named."""
