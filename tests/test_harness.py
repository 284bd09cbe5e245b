"""The server that ranks are forked from has imported what a run imports: no rank pays for it again."""

import sys

from tests.harness import run_ranks
from tests.integration.parallel_run import Case, train


def modules_imported_by_a_run() -> list[str]:
    before = set(sys.modules)
    train(Case(steps=1, num_layers=2))
    return sorted(set(sys.modules) - before)


def test_a_rank_imports_next_to_nothing() -> None:
    (found,) = run_ranks(1, modules_imported_by_a_run)
    assert len(found) < 20, f"name what imports them in tests/preload.py: {found}"
