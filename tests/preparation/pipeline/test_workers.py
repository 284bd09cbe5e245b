"""Work items go to whoever is free; each to one process, whatever its rank."""

from collections import Counter
from pathlib import Path

from deberta_dist.preparation.pipeline.workers import Worker, WorkerPool
from tests.preparation.pipeline.slow_phase import SlowPhase


def test_a_slow_worker_holds_up_nobody(tmp_path: Path) -> None:
    run, done = tmp_path / "run", tmp_path / "done"
    run.mkdir()
    done.mkdir()
    phase = SlowPhase(done, 30)
    with WorkerPool(run, rank=0, num_workers=3) as pool:
        pool.run(phase)
    counts = Counter(phase.done())
    # Every work item once; the slow one did its own, and the others the 29 that are left.
    assert sorted(int(path.stem) for path in done.iterdir()) == list(range(30))
    assert min(counts.values()) == 1 and sum(counts.values()) == 30
    assert sorted(path.name for path in run.glob("claim-*")) == sorted(f"claim-SlowPhase-{name}" for name in phase.item_names)


def test_a_work_item_is_claimed_once_in_a_start(tmp_path: Path) -> None:
    workers = [Worker(tmp_path, name=name) for name in ("0", "1")]
    assert [worker.claim("a") for worker in (*workers, *workers)] == [True, False, False, False]
    assert workers[1].claim("b") and not workers[0].claim("b")
