"""What can be wrong with inputs, disk and working directory: named, counted, and what was finished stays of use."""

import gzip
import json
import multiprocessing
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deberta_dist.data.token_file import TokenFile
from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.errors import ConfigError, DataError
from deberta_dist.files.lock import RunLock
from deberta_dist.preparation.pipeline.progress import Progress
from deberta_dist.preparation.pipeline.work_items import list_work_items
from deberta_dist.preparation.reading.texts import TextReadOptions
from tests.preparation.pipeline.runs import Start, parts_of
from tests.preparation.pipeline.small import documents_of, files_of, jsonl, prepare


class Killed(Exception):
    """Stands for a kill."""


def kill(*arguments: Any, **settings: Any) -> None:
    raise Killed


def at(phase: str, action: Callable[[], Any]) -> Callable[[Progress], None]:
    """A ``progress`` that does something once, when a phase begins."""
    left = [action]

    def progress(moment: Progress) -> None:
        if moment.phase == phase and left:
            left.pop()()

    return progress


def test_archives_that_end_early_and_inputs_without_documents(tokenizer: Tokenizer, texts: list[str], tmp_path: Path) -> None:
    jsonl(tmp_path / "in" / "a.jsonl", *texts[:4])
    (tmp_path / "in" / "b.txt").touch()
    (tmp_path / "in" / "c.jsonl").write_text('\n\n{"text": ""}\n{"text": " "}\n')
    whole = gzip.compress("\n\n".join(texts[4:]).encode())
    archive = tmp_path / "in" / "d.txt.gz"
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"d\.txt\.gz is cut short: its gz data ends after [\d,]+ bytes of text"):
        prepare([tmp_path / "in"], tmp_path / "x", tokenizer=tokenizer, piece_bytes=30_000)
    before = parts_of(tmp_path / "x")
    assert len(before) > 2
    archive.write_bytes(whole)
    kept: dict[str, tuple[int, int]] = {}
    progress = at("finding duplicates", lambda: kept.update(parts_of(tmp_path / "x")))
    # Nothing but parts of the archive is made anew; those of its first half have another name, the file has changed.
    outcome = prepare([tmp_path / "in"], tmp_path / "x", tokenizer=tokenizer, piece_bytes=30_000, progress=progress)
    assert before.items() <= kept.items()
    assert documents_of(tmp_path / "x" / "train") == [tokenizer.encode(text) for text in texts]
    total = outcome.total
    assert (total.files, total.read_documents, total.dropped) == (4, len(texts) + 2, {"empty": 2})
    archive.write_bytes(b"")
    with pytest.raises(DataError, match=r"d\.txt\.gz is cut short: it has no bytes"):
        prepare([tmp_path / "in"], tmp_path / "y", tokenizer=tokenizer)
    with pytest.raises(DataError, match=r"no document is left to write \(2 empty\)"):
        prepare([tmp_path / "in" / "b.txt", tmp_path / "in" / "c.jsonl"], tmp_path / "y", tokenizer=tokenizer)
    with pytest.raises(DataError, match=r"no readable file fits .*\*\.jsonl\.zst"):
        prepare([tmp_path / "in" / "*.jsonl.zst"], tmp_path / "z", tokenizer=tokenizer)
    assert not (tmp_path / "z").exists()


@pytest.mark.parametrize("num_bytes", [100_000_000, pytest.param(500_000_000, marks=pytest.mark.slow)])
def test_a_line_far_too_long_in_bounded_memory(tokenizer: Tokenizer, tmp_path: Path, num_bytes: int) -> None:
    path = jsonl(tmp_path / "a.jsonl", "before")
    with open(path, "a") as file:
        file.write('{"text": "')
        for _ in range(num_bytes // 1_000_000):
            file.write("word " * 200_000)
        file.write('"}\n{"text": "behind"}\n')
    arguments = ["--input", path, "--tokenizer", tokenizer.path, "--held-out", 0, "--max-document-bytes", 1_000_000]
    arguments += ["--workers", 2, "--piece-bytes", num_bytes // 3]
    output = tmp_path / "x"
    # The interpreter and its libraries take 160 MB of addresses; the line does not fit into what is left.
    with Start(output, arguments, memory_bytes=300_000_000) as start:
        code, _, errors = start.end()
    assert code == 65 and f"{path}:2: a line is larger than 1,000,000 bytes" in errors
    assert errors.splitlines()[-1].endswith("--bad-records drop leaves such documents out")
    with Start(output, [*arguments, "--bad-records", "drop"], memory_bytes=300_000_000) as start:
        assert start.end()[0] == 0
    assert documents_of(output / "train") == [tokenizer.encode("before"), tokenizer.encode("behind")]
    assert json.loads((output / "report.json").read_text())["total"]["dropped"] == {"too_long": 1}


def test_bytes_that_are_not_utf8_are_left_out_and_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"the time\n\ncaf\xe9\n\nwas late")
    options = TextReadOptions(invalid_utf8="drop")
    outcome = prepare([path], tmp_path / "x", tokenizer=tokenizer, reading=options)
    assert outcome.total.dropped == {"dropped_utf8": 1} and outcome.total.read_documents == 3
    assert documents_of(tmp_path / "x" / "train") == [tokenizer.encode("the time"), tokenizer.encode("was late")]


def test_an_input_that_changes_costs_its_own_parts_alone(tokenizer: Tokenizer, texts: list[str], tmp_path: Path) -> None:
    steady, changing = jsonl(tmp_path / "a.jsonl", *texts), jsonl(tmp_path / "b.jsonl", "the time")
    output = tmp_path / "x"

    def change() -> None:
        with open(changing, "a") as file:
            file.write('{"text": "was late"}\n')

    with pytest.raises(DataError, match=r"b\.jsonl changed while it was read .* run again when nothing writes to it"):
        prepare([steady, changing], output, tokenizer=tokenizer, progress=at("encoding", change))
    before = parts_of(output)
    assert len(before) == 1
    kept: dict[str, tuple[int, int]] = {}
    progress = at("finding duplicates", lambda: kept.update(parts_of(output)))
    prepare([steady, changing], output, tokenizer=tokenizer, progress=progress)
    assert before.items() < kept.items() and len(kept) == 2
    expected = [*texts, "the time", "was late"]
    assert documents_of(output / "train") == [tokenizer.encode(text) for text in expected]


def test_a_tokenizer_that_changes_is_noticed_or_does_not_matter(
    tokenizer: Tokenizer, other_tokenizer: Tokenizer, texts: list[str], tmp_path: Path
) -> None:
    path = jsonl(tmp_path / "a.jsonl", *texts[:3])
    model = tmp_path / "spm.model"

    def replace() -> None:
        model.write_bytes(other_tokenizer.path.read_bytes())

    for phase in ("encoding", "writing token files"):
        model.write_bytes(tokenizer.path.read_bytes())
        settings = {"tokenizer": Tokenizer(model), "num_workers": 2, "progress": at(phase, replace)}
        if phase == "encoding":
            with pytest.raises(DataError, match="spm.model is not the tokenizer that this preparation began with"):
                prepare([path], tmp_path / phase, **settings)
        else:
            prepare([path], tmp_path / phase, **settings)
            assert TokenFile(tmp_path / phase / "train" / "00000.tokens").tokenizer_sha256 == tokenizer.sha256
    with pytest.raises(ConfigError, match="unfinished preparation with another tokenizer_sha256"):
        prepare([path], tmp_path / "encoding", tokenizer=Tokenizer(model))


@pytest.mark.parametrize(
    ("array", "near"),
    [("ids", None), ("lengths", None), ("held_out", None), ("hash_high", None), ("order", None), ("signatures", 0.8)],
)
def test_a_bit_that_flips_in_a_part_is_found(
    tokenizer: Tokenizer, texts: list[str], tmp_path: Path, array: str, near: float | None
) -> None:
    paths = [jsonl(tmp_path / f"{name}.jsonl", *texts[:3]) for name in "ab"]
    output, settings = tmp_path / "x", {"tokenizer": tokenizer, "held_out_percent": 40.0, "near_duplicates": near}
    damaged: list[Path] = []

    def flip() -> None:
        # Of the first file: nothing that is only in the second stays, so nobody would look at all of it.
        name = list_work_items(paths, [], range_bytes=1 << 23)[0][0].name
        (path,) = (output / ".work" / "parts").glob(f"{name}.*")
        content = bytearray(path.read_bytes())
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        content[8 + size + header[array]["data_offsets"][0]] ^= 1
        path.write_bytes(content)
        damaged.append(path)

    with pytest.raises(Killed):
        prepare(paths, output, progress=at("finding duplicates", kill), **settings)
    flip()
    with pytest.raises(DataError, match=rf"\.part is damaged \(the checksum of {array} is another\): remove this file"):
        prepare(paths, output, **settings)
    damaged[0].unlink()
    prepare(paths, output, **settings)
    prepare(paths, tmp_path / "whole", **settings)
    assert files_of(output) == files_of(tmp_path / "whole")


def test_a_bit_that_flips_in_a_list_or_a_token_file_is_found(
    tokenizer: Tokenizer, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, output = [jsonl(tmp_path / f"{name}.jsonl", *texts[:3]) for name in "ab"], tmp_path / "x"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("deberta_dist.preparation.pipeline.prepare.write_index", kill)
        prepare(paths, output, tokenizer=tokenizer)
    for suffix in ("dropped", "tokens"):
        (path,) = output.rglob(f"*.{suffix}")
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"\.{suffix} is damaged .*: remove this file and run the same command"):
            prepare(paths, output, tokenizer=tokenizer)
        path.unlink()
    prepare(paths, output, tokenizer=tokenizer)
    assert documents_of(output / "train") == [tokenizer.encode(text) for text in texts[:3]]


def test_a_second_start_is_refused_while_one_is_at_work(tokenizer: Tokenizer, texts: list[str], tmp_path: Path) -> None:
    path, output = jsonl(tmp_path / "a.jsonl", *texts), tmp_path / "x"

    def again() -> None:
        with pytest.raises(ConfigError, match=r"--output: working directory = .*/x/\.work is in use by another run"):
            prepare([path], output, tokenizer=tokenizer)

    prepare([path], output, tokenizer=tokenizer, progress=at("finding duplicates", again))
    assert documents_of(output / "train") == [tokenizer.encode(text) for text in texts]


def test_a_corpus_completed_before_the_lock_is_had_is_left(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, output = jsonl(tmp_path / "a.jsonl", "the time"), tmp_path / "x"

    def late(*arguments: Any, **settings: Any) -> RunLock:
        monkeypatch.undo()
        prepare([path], output, tokenizer=tokenizer)
        return RunLock(*arguments, **settings)

    monkeypatch.setattr("deberta_dist.preparation.pipeline.prepare.RunLock", late)
    with pytest.raises(DataError, match="x is a complete corpus and is not overwritten"):
        prepare([path], output, tokenizer=tokenizer)
    assert documents_of(output / "train") == [tokenizer.encode("the time")] and not (output / ".work").exists()


def test_a_full_disk_in_every_phase(tokenizer: Tokenizer, texts: list[str], tmp_path: Path) -> None:
    paths = [jsonl(tmp_path / "a.jsonl", *texts[:8]), jsonl(tmp_path / "b.jsonl", *texts[4:])]
    settings = {"tokenizer": tokenizer, "held_out_percent": 30.0, "shard_bytes": 1 << 14}
    prepare(paths, tmp_path / "whole", **settings)
    expected = files_of(tmp_path / "whole")
    output = tmp_path / "x"
    told: list[str] = []
    # A file may have so many bytes, which stands for a disk that has: for a part too few, for the rest, for a report.
    for limit in (100, 20_000, 4096 + 2000, 1500):
        receiver, sender = multiprocessing.Pipe(duplex=False)

        def run(limit: int = limit, sender: Any = sender) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                prepare(paths, output, **settings)
            except (DataError, OSError) as error:
                sender.send(f"{type(error).__name__}: {error}")

        process = multiprocessing.get_context("fork").Process(target=run)
        process.start()
        assert receiver.poll(30)
        told.append(receiver.recv())
        process.join()
        if limit == 20_000:
            # Parts are larger than token files here: made where there is room, they are what the next starts find.
            with pytest.raises(Killed):
                prepare(paths, output, progress=at("finding duplicates", kill), **settings)
    assert all(line.startswith("DataError") and "File too large" in line and "make room" in line for line in told), told
    assert "recipe.json" in told[0] and ".part" in told[1] and ".tokens" in told[2]
    prepare(paths, output, **settings)
    assert files_of(output) == expected
    assert not list(output.rglob(".*"))


def test_an_output_that_cannot_be_written(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", "the time")
    for output in (path / "x", Path("/proc/no/x")):
        with pytest.raises(ConfigError, match=rf"--output: working directory = {output}/\.work cannot be written to"):
            prepare([path], output, tokenizer=tokenizer)
