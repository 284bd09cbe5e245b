"""Kills, wherever they come: the same command goes on, makes nothing twice, and ends with the undisturbed bytes."""

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.errors import DataError
from deberta_dist.preparation.reading.texts import TextReadOptions, read_texts
from tests.preparation.pipeline.runs import Start, children, num_shards, parts_of, shards_of
from tests.preparation.pipeline.small import files_of, jsonl, prepare
from tests.small_corpus import DEMO_TEXT

# What changes the file system, beside writing to files that have no name yet.
CALLS = ("open", "mkdir", "fsync", "link", "replace", "unlink", "rmdir")


@contextmanager
def counted(before: Callable[[int, str], None]) -> Iterator[None]:
    """Calls ``before`` with a number and a name before every system call of ``CALLS``."""
    number = 0

    def wrap(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            nonlocal number
            before(number, name)
            number += 1
            return original(*arguments, **settings)

        return call

    originals = {name: getattr(os, name) for name in CALLS}
    for name, original in originals.items():
        setattr(os, name, wrap(name, original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


def in_a_fork(function: Callable[[], Any]) -> int | None:
    """Exit code of a process that calls a function; minus the signal that killed it."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join(60)
    return process.exitcode


@pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_before_any_system_call(
    tokenizer: Tokenizer, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)  # a killed process leaves what it has written; and it is slow
    inputs = [
        f"a={jsonl(tmp_path / 'a.jsonl', *texts[:6])}",
        f"b={jsonl(tmp_path / 'b.jsonl', texts[0], texts[7])}",
    ]
    settings = {"tokenizer": tokenizer, "held_out_percent": 30.0, "shard_bytes": 1 << 14, "piece_bytes": 20_000}
    seen: list[str] = []
    with counted(lambda number, name: seen.append(name)):
        prepare(inputs, tmp_path / "whole", **settings)
    expected = files_of(tmp_path / "whole")
    assert set(seen) == set(CALLS) and {"train/a/00001.tokens", "heldout/index.json"} < expected.keys()
    for last in range(0, len(seen), step):
        output = tmp_path / f"{last}"

        def die(number: int, name: str, last: int = last) -> None:
            if number == last:
                os.kill(os.getpid(), signal.SIGKILL)

        with counted(die):
            assert in_a_fork(lambda output=output: prepare(inputs, output, **settings)) == -signal.SIGKILL
        assert files_of(output).keys() & expected.keys() in (set(), expected.keys()) or (output / ".work").is_dir()
        if (output / "report.json").exists():
            # All but the working directory was done; the next start clears it away.
            with pytest.raises(DataError, match="is a complete corpus"):
                prepare(inputs, output, **settings)
        else:
            prepare(inputs, output, **settings)
        assert files_of(output) == expected, (last, seen[last])
        assert not (output / ".work").exists()
        shutil.rmtree(output)


def test_killed_in_every_phase(tokenizer: Tokenizer, tmp_path: Path) -> None:
    # Some hundred token files: enough for several moments of the last phase.
    text = tmp_path / "paragraphs.txt"
    text.write_text("\n".join(read_texts([DEMO_TEXT])), encoding="utf-8")
    arguments = ["--input", text, "--document", "line", "--tokenizer", tokenizer.path, "--piece-bytes", 20_000]
    arguments += ["--shard-bytes", 1 << 12, "--workers", 2]
    output = tmp_path / "killed"
    with Start(output, arguments) as start:
        start.when(lambda: len(parts_of(output)) >= 3, what="three parts")
        start.send(signal.SIGKILL)
        assert start.end()[0] == -signal.SIGKILL
    parts = parts_of(output)
    assert len(parts) < 80  # of 260: its workers end, too
    with Start(output, arguments) as start:
        start.when(lambda: len(parts_of(output)) >= len(parts) + 3, what="more parts")
        worker = children(start.pid)[-1]
        start.send(signal.SIGKILL, pid=worker)
        code, _, errors = start.end()
        assert code == 75 and "was killed by signal 9 (Killed): run the same command again" in errors
    assert parts.items() <= (more := parts_of(output)).items()
    with Start(output, arguments) as start:
        start.when(lambda: len(parts_of(output)) >= len(more) + 3, what="more parts")
        start.send(signal.SIGINT, group=True)  # as a terminal does
        code, _, errors = start.end()
        assert (code, errors.splitlines()[-1]) == (130, "interrupted") and "Traceback" not in errors
    assert more.items() <= (parts := parts_of(output)).items()
    with Start(output, arguments) as start:
        start.when(lambda: num_shards(output) >= 3, what="three token files")
        start.send(signal.SIGKILL, group=True)  # no more are made: there is a moment for the next start
        start.end()
    assert parts.items() <= (more := parts_of(output)).items()
    shards = shards_of(output)
    with Start(output, arguments) as start:
        start.when(lambda: num_shards(output) >= len(shards) + 3, what="more token files")
        start.send(signal.SIGTERM)
        code, _, errors = start.end()
        assert code == 143 and "Traceback" not in errors and "error" not in errors
    assert more == parts_of(output) and shards.items() < shards_of(output).items()
    with Start(output, arguments) as start:
        code, told, _ = start.end()
        assert code == 0 and told.startswith(f"{output}: ")
    reading = TextReadOptions(document="line")
    whole = tmp_path / "whole"
    prepare([text], whole, tokenizer=tokenizer, reading=reading, held_out_percent=5.0, shard_bytes=1 << 12)
    assert files_of(output) == files_of(whole)
    assert not (output / ".work").exists() and not list(output.rglob(".*"))
