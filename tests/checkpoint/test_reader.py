"""Any layout reads what any other wrote, touching no more than it needs; every damage is named."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from deberta_dist.checkpoint import manifest as manifest_module
from deberta_dist.checkpoint.errors import CheckpointError, CheckpointVersionError
from deberta_dist.checkpoint.find import checkpoints, newest_complete
from deberta_dist.checkpoint.reader import CheckpointReader, open_checkpoint
from deberta_dist.checkpoint.rectangles import Window, overlap, rectangles, view
from deberta_dist.checkpoint.shard_file import STATES
from tests.checkpoint.test_manifest import newer
from tests.checkpoint.test_slices import CASES, Case, assert_readable, known_tensors, write_checkpoint

WORDS = "deberta.embeddings.word_embeddings.weight"
ROW = "deberta.encoder.layer.1.output.dense.weight"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Path]:
    """A checkpoint of every layout."""
    return {case: write_checkpoint(tmp_path_factory.mktemp("written"), case) for case in CASES}


@pytest.fixture
def copy(written: dict[Case, Path], tmp_path: Path) -> Path:
    """A checkpoint of 2 x 2 x 2 to damage."""
    return Path(shutil.copytree(written[CASES[1]], tmp_path / "step-00000100"))


@pytest.mark.parametrize("writer", CASES, ids=str)
def test_every_layout_reads_it(writer: Case, written: dict[Case, Path]) -> None:
    reader = open_checkpoint(written[writer])
    known = known_tensors(writer.model)
    assert reader.names == tuple(known["weight"])
    for state in STATES:
        for name, full in known[state].items():
            assert reader.shape(name) == tuple(full.shape)
            assert torch.equal(reader.read(name, state=state), full)
    for case in CASES:
        if case.model == writer.model:
            assert_readable(reader, case, known)


@pytest.mark.parametrize("reading", [Case(), Case(tensor=4, data=3), Case(tensor=2, pipeline=2, data=2)], ids=str)
def test_ranks_read_every_number_once(reading: Case, written: dict[Case, Path]) -> None:
    """What all ranks of a layout copy together is what there is, whatever layout wrote it."""
    for writer, path in written.items():
        if writer.model != reading.model:
            continue
        copied = 0
        for rank in range(reading.shape.world_size):
            here, reader = reading.shape.mesh_rank(rank), CheckpointReader(path)
            reader.read_shards(reading.flat_layout(here.pipeline, here.tensor), shape=reading.shape, mesh_rank=here)
            copied += reader.bytes_copied
        assert copied == 3 * 4 * sum(math.prod(entry.shape) for entry in reader.manifest.tensors.values())


def test_any_range_of_any_cut(written: dict[Case, Path]) -> None:
    generator = torch.Generator().manual_seed(3)
    for writer in CASES[:4]:
        reader = open_checkpoint(written[writer], verify=False)
        for name in (WORDS, ROW, "deberta.encoder.conv.conv.weight", "lm_predictions.lm_head.bias"):
            full = known_tensors("v2")["exp_avg"][name]
            for _ in range(40):
                dim = int(torch.randint(0, min(full.ndim, 2), (), generator=generator))
                start, stop = sorted(torch.randperm(full.shape[dim] + 1, generator=generator)[:2].tolist())
                expected = full.narrow(dim, start, stop - start).reshape(-1)
                begin, end = sorted(torch.randint(0, expected.numel() + 1, (2,), generator=generator).tolist())
                before = reader.bytes_copied
                found = reader.read_range(name, begin=begin, count=end - begin, state="exp_avg", cut=(dim, start, stop))
                assert torch.equal(found, expected[begin:end])
                assert reader.bytes_copied - before == 4 * (end - begin)


def test_rows_behind_the_vocabulary_are_zeros(written: dict[Case, Path]) -> None:
    full = known_tensors("v2")["weight"][WORDS]
    for writer in CASES[:3]:
        found = open_checkpoint(written[writer], verify=False).read(WORDS, cut=(0, 192, 512))
        assert torch.equal(found[:11], full[192:])
        assert found.shape == (320, 16) and not found[11:].any()
    assert not open_checkpoint(written[CASES[2]]).read(WORDS, cut=(0, 384, 512)).any()


def test_only_files_that_are_needed_are_touched(copy: Path) -> None:
    reader = open_checkpoint(copy, verify=False)
    tensor_slice = reader.manifest.tensors[ROW].slices[0]
    needed = {flat_range.file for flat_range in tensor_slice.ranges}
    assert 1 <= len(needed) < len(reader.manifest.files)
    for name in reader.manifest.files:
        if name not in needed:
            (copy / name).unlink()
    full = known_tensors("v2")["weight"][ROW]
    assert torch.equal(
        reader.read(ROW, cut=(1, tensor_slice.start, tensor_slice.stop)), full[:, tensor_slice.start : tensor_slice.stop]
    )
    assert reader.bytes_copied == 4 * 16 * 12
    with pytest.raises(CheckpointError, match="rank-.* is missing"):
        reader.read(ROW)
    with pytest.raises(CheckpointError, match="rank-.* is missing"):
        reader.verify()


def test_the_library_reads_the_files(copy: Path) -> None:
    case, known = CASES[1], known_tensors("v2")
    with safe_open(copy / "rank-00003.safetensors", "pt") as file:
        assert set(file.keys()) == {f"flat.{flat}.{state}" for flat in (0, 1) for state in STATES}
        for flat, shard in enumerate(case.shards(known, 3)):
            for state in STATES:
                assert file.get_tensor(f"flat.{flat}.{state}").equal(getattr(shard, state)) or torch.equal(
                    file.get_tensor(f"flat.{flat}.{state}").nan_to_num(-1), getattr(shard, state).nan_to_num(-1)
                )


def _flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "rank-00002.safetensors is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "rank-00002.safetensors is truncated"),
        (lambda path: path.write_bytes(b""), "rank-00002.safetensors is truncated: it has 0 bytes"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "rank-00002.safetensors is too long"),
        (lambda path: _flip(path, -1), "rank-00002.safetensors: its checksum"),
        (lambda path: _flip(path, 10), "rank-00002.safetensors: its checksum"),
        (lambda path: path.write_bytes(bytes(path.stat().st_size)), "rank-00002.safetensors: its checksum"),
        (lambda path: (path.parent / "manifest.json").unlink(), "manifest.json cannot be read"),
        (lambda path: (path.parent / "manifest.json").write_bytes(b""), "manifest.json is not valid JSON"),
        (lambda path: shutil.copy(path.parent / "rank-00003.safetensors", path), "checksum|truncated|too long"),
    ],
)
def test_damage_is_named_and_the_one_before_is_used(copy: Path, written: dict[Case, Path], damage, message: str) -> None:
    damage(copy / "rank-00002.safetensors")
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(copy)
    assert caught.value.exit_code == 65
    skipped: list[str] = []
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be used"):
        newest_complete(copy.parent, on_skip=skipped.append)
    write_checkpoint(copy.parent, Case(data=2), step=50)
    reader = newest_complete(copy.parent, on_skip=skipped.append)
    assert reader is not None and reader.manifest.step == 50
    assert len(skipped) == 2 and "step-00000100 is not used" in skipped[1]


def test_no_flipped_bit_of_the_manifest_goes_unnoticed(copy: Path) -> None:
    path = copy / "manifest.json"
    sound = path.read_bytes()
    before = CheckpointReader(copy).manifest
    for position in range(0, len(sound), len(sound) // 200):
        for bit in (1, 4):
            path.write_bytes(sound[:position] + bytes([sound[position] ^ bit]) + sound[position + 1 :])
            try:
                assert CheckpointReader(copy).manifest == before  # white space for white space
            except CheckpointError as error:
                assert "manifest.json" in str(error)


def _replace_file(directory: Path, content: bytes) -> CheckpointReader:
    """Another file with size and checksum in the manifest made right: only what is in it is wrong."""
    (directory / "rank-00002.safetensors").write_bytes(content)
    document = json.loads((directory / "manifest.json").read_text())
    document.pop("sha256")
    document["files"]["rank-00002.safetensors"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    document["sha256"] = manifest_module._checksum(document)
    (directory / "manifest.json").write_text(json.dumps(document))
    return CheckpointReader(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header["flat.0.weight"].update(dtype="F16"), "flat.0.weight: not a float32 shard"),
        (lambda header: header["flat.0.exp_avg"].update(shape=[2**60]), "flat.0.exp_avg: not a float32 shard"),
        (lambda header: header["flat.1.weight"].update(data_offsets=[0, 4]), "flat.1.weight: not a float32 shard"),
        (lambda header: header["flat.0.weight"].update(shape=[-1]), "whole number"),
        (lambda header: header["flat.0.weight"].update(shape=[]), "whole number"),
        (lambda header: header["flat.0.weight"].update(more=1), "unknown keys"),
        (lambda header: header.pop("flat.1.exp_avg_sq"), "5 tensors, not 3 for every"),
        (lambda header: header.update({"../../x": header["flat.0.weight"]}), "'../../x' found"),
        (lambda header: [header.pop(f"flat.1.{state}") for state in STATES], "truncated or damaged"),
        (lambda header: header.clear(), "0 tensors"),
    ],
)
def test_a_header_that_is_not_ours_is_refused(copy: Path, change, message: str) -> None:
    content = (copy / "rank-00002.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    reader = _replace_file(copy, len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(CheckpointError, match=message):
        reader.verify()


@pytest.mark.parametrize("length", [0, 1, 2**20 + 1, 2**63])
def test_an_absurd_header_length_is_refused(copy: Path, length: int) -> None:
    reader = _replace_file(copy, length.to_bytes(8, "little") + b"{" * 2**19)
    with pytest.raises(CheckpointError, match=f"header of {length} bytes"):
        reader.verify()


def test_a_sound_file_of_another_layout_is_refused(copy: Path, written: dict[Case, Path]) -> None:
    reader = _replace_file(copy, (written[Case(data=5)] / "rank-00002.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="belongs to another layout"):
        for name in reader.names:
            reader.read(name)


def test_finding(tmp_path: Path) -> None:
    said: list[str] = []
    assert newest_complete(tmp_path / "nowhere", on_skip=said.append) is None
    assert newest_complete(tmp_path, on_skip=said.append) is None
    for step in (5, 100, 20):
        write_checkpoint(tmp_path, Case(), step=step)
    for name in ("step-7", "step-0000000200", ".tmp-step-00000300-x", "step-00000300x"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000400").write_text("a file")
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000100", "step-00000020", "step-00000005"]
    reader = newest_complete(tmp_path, on_skip=said.append)
    assert reader is not None and reader.manifest.step == 100 and not said
    for hint in ("", "ste", "step-00000005\n", "../../x", "\xff"):
        (tmp_path / "latest").write_text(hint)
        assert newest_complete(tmp_path, on_skip=said.append).manifest.step == 100 and not said
    (tmp_path / "latest").write_text("step-00000500")
    assert newest_complete(tmp_path, on_skip=said.append).manifest.step == 100
    assert "names step-00000500, which is missing" in said[0]
    for path in checkpoints(tmp_path):
        shutil.rmtree(path)
    with pytest.raises(CheckpointError, match="which is missing.*start over"):
        newest_complete(tmp_path, on_skip=said.append)


def test_a_newer_format_is_neither_read_nor_skipped(copy: Path) -> None:
    write_checkpoint(copy.parent, Case(), step=50)
    (copy / "manifest.json").write_bytes(newer(2))
    with pytest.raises(CheckpointVersionError, match="format version 2.*reads versions up to 1"):
        newest_complete(copy.parent, on_skip=print)


def test_a_checkpoint_under_another_name_is_not_used(copy: Path) -> None:
    write_checkpoint(copy.parent, Case(), step=50)
    copy.rename(copy.with_name("step-00000300"))
    said: list[str] = []
    reader = newest_complete(copy.parent, on_skip=said.append)
    assert reader is not None and reader.manifest.step == 50
    assert any("another name than its step, 100" in text for text in said)


def test_rectangles_against_numpy() -> None:
    generator = np.random.default_rng(0)
    matrix = np.arange(70, dtype=np.float32).reshape(10, 7)
    for _ in range(300):
        windows, runs = [], []
        for _ in range(2):
            top, bottom = sorted(generator.choice(11, 2, replace=False))
            left, right = sorted(generator.choice(8, 2, replace=False))
            part = Window(int(top), int(left), int(bottom - top), int(right - left))
            begin, end = sorted(int(x) for x in generator.integers(0, part.num_elements + 1, 2))
            windows.append(part)
            runs.append((begin, end - begin))
        flat = [matrix[w.top : w.top + w.height, w.left : w.left + w.width].reshape(-1) for w in windows]
        source = flat[0][runs[0][0] : sum(runs[0])].copy()
        wanted = flat[1][runs[1][0] : sum(runs[1])]
        result = np.full(len(wanted), -1, np.float32)
        sources, targets = (rectangles(w, begin=b, count=c, address=0) for w, (b, c) in zip(windows, runs, strict=True))
        assert len(sources) <= 3 and len(targets) <= 3
        for s in sources:
            for t in targets:
                if common := overlap(s, t):
                    view(result, t, part=common)[:] = view(source, s, part=common)
        assert np.array_equal(result, np.where(np.isin(wanted, source), wanted, -1))
