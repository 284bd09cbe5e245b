"""Under mpirun: the same bytes from any number of ranks, one error and its exit code, killed and slow ranks."""

import importlib.util
import os
import signal
from pathlib import Path

import pytest

from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.preparation.pipeline.ranks import PreparationRanks
from deberta_dist.preparation.pipeline.work_items import list_work_items
from tests.preparation.pipeline.runs import Start, children, mpirun, parts_of
from tests.preparation.pipeline.small import files_of, jsonl, prepare
from tests.small_corpus import DEMO_TEXT

pytestmark = [
    pytest.mark.serial,
    pytest.mark.skipif(
        mpirun() is None or importlib.util.find_spec("mpi4py") is None,
        reason="no mpirun, or no mpi4py: pip install -r launchers/requirements-test.txt brings both",
    ),
]
PIECE_BYTES, SHARD_BYTES = 10_000, 1 << 18  # some hundred parts: mpirun goes on while a test looks


@pytest.fixture(scope="module")
def expected(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("whole") / "x"
    prepare([DEMO_TEXT], output, tokenizer=tokenizer, held_out_percent=5.0, shard_bytes=SHARD_BYTES)
    return files_of(output)


def arguments_for(tokenizer: Tokenizer, *, num_workers: int) -> list[object]:
    return [
        "--input", DEMO_TEXT, "--tokenizer", tokenizer.path, "--workers", num_workers, "--piece-bytes", PIECE_BYTES,
        "--shard-bytes", SHARD_BYTES,
    ]  # fmt: skip


@pytest.mark.slow
def test_killed_ranks_and_workers_of_two_then_four(tokenizer: Tokenizer, tmp_path: Path, expected: dict[str, bytes]) -> None:
    output = tmp_path / "x"
    two = arguments_for(tokenizer, num_workers=2)
    with Start(output, two, num_ranks=2) as start:
        start.when(lambda: len(parts_of(output)) >= 3, what="three parts")
        start.send(signal.SIGKILL, pid=children(start.pid)[1])
        assert start.end()[0] == 128 + signal.SIGKILL  # and all ranks and workers end
    parts = parts_of(output)
    with Start(output, two, num_ranks=2) as start:
        start.when(lambda: len(parts_of(output)) >= len(parts) + 3, what="more parts")
        start.send(signal.SIGKILL, pid=children(children(start.pid)[1])[-1])
        code, _, errors = start.end()
    assert code == 75 and errors.count("error: ") == 1 and "was killed by signal 9" in errors
    assert parts.items() < (more := parts_of(output)).items()
    with Start(output, arguments_for(tokenizer, num_workers=1), num_ranks=4) as start:
        code, told, errors = start.end()
    assert code == 0 and told.startswith(f"{output}: "), errors
    assert files_of(output) == expected and len(more) > 6


def test_a_rank_that_stands_still_leaves_the_work_to_the_other(
    tokenizer: Tokenizer, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    output, num_items = tmp_path / "x", len(list_work_items([DEMO_TEXT], [], range_bytes=PIECE_BYTES)[0])
    with Start(output, arguments_for(tokenizer, num_workers=1), num_ranks=2) as start:
        start.when(lambda: parts_of(output), what="the first part")
        slow = children(start.pid)[1]
        start.send(signal.SIGSTOP, pid=slow)
        # All work items but the one that it may have taken.
        start.when(lambda: len(parts_of(output)) >= num_items - 1, what="the other's parts")
        start.send(signal.SIGCONT, pid=slow)
        code, _, errors = start.end()
    assert code == 0, errors
    assert files_of(output) == expected


def test_an_error_is_told_once_and_keeps_its_exit_code(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", "the time")
    path.write_text(path.read_text() + '{"other": 1}\n')
    arguments = ["--input", path, "--tokenizer", tokenizer.path]
    for more, code, message in (
        ([], 65, f"error: {path}:2: no string in the field 'text'; fields here: other"),
        (["--unknown"], 2, "error: unrecognized arguments: --unknown"),
    ):
        with Start(tmp_path / "x", [*arguments, *more], num_ranks=2) as start:
            found, _, errors = start.end()
        assert found == code and errors.count(message) == 1 and errors.count("error: ") == 1, errors
        assert "Traceback" not in errors


def test_ranks_bound_to_few_cores_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    monkeypatch.delenv("OMPI_COMM_WORLD_SIZE", raising=False)
    assert PreparationRanks().unused_cores(num_workers=4) is None
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert PreparationRanks().unused_cores(num_workers=1) is None
    told = PreparationRanks().unused_cores(num_workers=4)
    assert told is not None and "4 workers of each rank share 1 of 8 cores" in told and "--bind-to none" in told
