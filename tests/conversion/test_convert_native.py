"""A run's own checkpoint, written by several ranks with a padded vocabulary, as the source of conversions."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from deberta_dist.checkpoint.errors import CheckpointError
from deberta_dist.conversion import native
from deberta_dist.conversion.convert import convert
from deberta_dist.conversion.inspect import difference, inspect
from deberta_dist.data.tokenizer import train_tokenizer
from deberta_dist.errors import DataError
from tests.checkpoint.test_slices import Case, known_tensors, write_checkpoint
from tests.conversion.small_models import same


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with the checkpoints of two steps; 203 tokens on two ranks are padded to 256."""
    for step in (100, 200):
        write_checkpoint(tmp_path / "run/checkpoints", Case(tensor=2, pipeline=2, data=2), step=step)
    return tmp_path / "run"


def test_every_target(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Small, so that the reader is opened again and tensors are read in parts.
    monkeypatch.setattr(native, "CHUNK_NUMBERS", 100)
    monkeypatch.setattr(native, "_REOPEN_BYTES", 10_000)
    expected = known_tensors("v2")["weight"]
    for number, source in enumerate((run, run / "checkpoints/step-00000100")):
        for to in ("huggingface", "official", "deberta_dist"):
            report = convert(source, tmp_path / f"{to}{number}", to=to)
            assert report["source"]["step"] == (200, 100)[number]
            assert "checkpoint of a run at step" in report["source"]["recognised"]
            assert report["source"]["dtype"] == ["float32"] and len(report["kept"]) == len(expected)
        found = load_file(tmp_path / f"deberta_dist{number}/model.safetensors")
        assert found["deberta.embeddings.word_embeddings.weight"].shape == (203, 16)
        assert same(found, expected)
        assert same(load_file(tmp_path / f"huggingface{number}/model.safetensors"), expected)
        assert difference(source, tmp_path / f"official{number}")["equal"] == len(expected)
    assert "at step 200" in (tmp_path / "huggingface0/README.md").read_text()


def test_inspection(run: Path) -> None:
    found = inspect(run / "checkpoints/step-00000200")
    assert found["step"] == 200 and found["layout"] == {"tensor": 2, "pipeline": 2, "data": 2, "schedule": "1f1b"}
    assert found["checksums"] == "every file is as it was written" and found["problems"] == []
    shard = run / "checkpoints/step-00000200/rank-00003.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert "DAMAGED" in inspect(run / "checkpoints/step-00000200")["checksums"]


def test_an_older_checkpoint_is_used_with_a_warning(run: Path, tmp_path: Path) -> None:
    shard = run / "checkpoints/step-00000200/rank-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    report = convert(run, tmp_path / "weights", to="deberta_dist")
    assert report["source"]["step"] == 100
    assert any("step-00000200" in warning and "truncated" in warning for warning in report["warnings"])


def test_what_is_refused(run: Path, tmp_path: Path) -> None:
    for step in (100, 200):
        shard = run / f"checkpoints/step-00000{step}/rank-00003.safetensors"
        shard.write_bytes(shard.read_bytes()[:-4])
    for source in (run, run / "checkpoints/step-00000100"):
        with pytest.raises(CheckpointError, match="truncated"):
            convert(source, tmp_path / "no", to="deberta_dist")
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="holds no checkpoint yet"):
        convert(tmp_path / "empty", tmp_path / "no", to="deberta_dist")


def test_another_tokenizer_than_the_runs(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "spm.model"
    train_tokenizer(["the quick brown fox jumps over the lazy dog"] * 9, path, vocab_size=32)
    with pytest.raises(DataError, match="the run used abababababab"):
        convert(run, tmp_path / "no", to="huggingface", tokenizer_path=path)
