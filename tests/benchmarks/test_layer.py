"""The attention benchmark: contestants agree before they are timed, the floor has the formula's products."""

import argparse
import collections
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import layer, peers, stopwatch
from benchmarks.attention_contestants import AttentionCase, layer_saved_bytes
from deberta_dist.errors import ConfigError
from deberta_dist.operations.measure import BenchmarkError

BATCH, LENGTH, HEADS = 2, 64, 2


def arguments(**changed: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    layer.add_arguments(parser)
    flags = ["--batch-size", str(BATCH), "--length", str(LENGTH), "--heads", str(HEADS)]
    return argparse.Namespace(**vars(parser.parse_args(flags)) | {"rounds": 1} | changed)


@pytest.fixture(scope="module")
def case() -> AttentionCase:
    cpu = torch.device("cpu")
    return AttentionCase(batch_size=BATCH, length=LENGTH, heads=HEADS, dropout=0.1, device=cpu, dtype=torch.float32)


def test_everyone_is_compared_timed_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    found = layer.run(arguments())
    names = [layer.PORTABLE, layer.RECOMPUTED, layer.REFERENCE, peers.HUGGING_FACE]
    names += [peers.DISENTANGLED_FLASH] * peers.has_disentangled_flash()
    assert list(found["agreement"]) == names and max(found["agreement"].values()) < 1e-5
    figures = found["figures"]
    assert figures.keys() == {*names, layer.NO_POSITIONS, layer.FLOOR}
    assert all(row["range"][0] > 0 for row in figures.values())
    probabilities = BATCH * HEADS * LENGTH * LENGTH * 4
    assert figures[layer.PORTABLE]["saved_bytes"] - figures[layer.RECOMPUTED]["saved_bytes"] == probabilities
    assert figures[layer.REFERENCE]["saved_bytes"] > figures[layer.PORTABLE]["saved_bytes"] + 2 * probabilities
    text = capsys.readouterr().out
    assert "products alone" in text
    assert ("disentangled-flash is not measured" in text) != peers.has_disentangled_flash()


def test_whole_layers_are_compared_and_timed(capsys: pytest.CaptureFixture[str]) -> None:
    found = layer.run(arguments(part="whole"))
    assert set(found["agreement"]) == {"ours", peers.HUGGING_FACE} and max(found["agreement"].values()) < 1e-5
    assert set(found["figures"]) == {"ours", "ours, SDPA without positions", peers.HUGGING_FACE}
    assert "a whole layer, forward and backward" in capsys.readouterr().out


def test_disentangled_flash_gives_the_same(case: AttentionCase) -> None:
    pytest.importorskip("disentangled_flash", reason="not installed: pip install 'deberta_dist[peers]'")
    forward = case.disentangled_flash()
    with case.no_dropout():
        found = {"ours": case.values(case.ours("reference")), "theirs": case.values(forward)}
    assert stopwatch.require_agreement(found, oracle="ours", tolerance=1e-5)["theirs"] > 0


def test_bytes_of_the_large_models_layer() -> None:
    mebibytes = {name: count / 2**20 for name, count in layer_saved_bytes(None).items()}
    assert mebibytes["ours"] <= 45 and mebibytes["ours, selective recomputation"] <= 32
    assert 85 < mebibytes[peers.HUGGING_FACE] < 100, "transformers keeps more than twice as much"


def test_the_floor_is_the_formulas_products_forward_and_backward(case: AttentionCase) -> None:
    def products(run) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    reference = products(lambda: case.ours("reference")().sum().backward())
    assert products(case.products_alone()) == reference


def test_different_results_are_not_compared(case: AttentionCase) -> None:
    with case.no_dropout():
        values = case.values(case.ours("reference"))
        changed = [*values[:-1], values[-1] + 1e-3 * values[-1].abs().max()]
        assert stopwatch.require_agreement({"a": values, "b": values}, oracle="a", tolerance=1e-5) == {"a": 0, "b": 0}
        with pytest.raises(BenchmarkError, match=r"b differs from a by 1.0e-03 of the largest value; at most 1e-05"):
            stopwatch.require_agreement({"a": values, "b": changed}, oracle="a", tolerance=1e-5)
        with pytest.raises(BenchmarkError, match="nan"):
            stopwatch.require_agreement({"a": values, "b": [x * float("nan") for x in values]}, oracle="a", tolerance=1)


def test_a_folder_without_the_published_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What a checkout needs in place of missing packages stays in this process.
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    monkeypatch.setattr(sys, "path", list(sys.path))
    for module, name in ((numpy, "int"), (numpy, "float"), (collections, "Sequence")):
        monkeypatch.setattr(module, name, None, raising=False)
    with pytest.raises(ConfigError, match=r"--official .*holds no DeBERTa/deberta.*expected a checkout of"):
        layer.run(arguments(official=tmp_path))
    package = tmp_path / "DeBERTa" / "deberta"
    package.mkdir(parents=True)
    (package / "disentangled_attention.py").write_text("")
    (package / "__init__.py").write_text("import a_module_that_nobody_has")
    with pytest.raises(ConfigError, match="cannot be imported: No module named 'a_module_that_nobody_has'"):
        peers.published_module(tmp_path, "deberta")
