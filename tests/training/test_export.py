"""Weights asked of their owners on eight ranks, and the file they are written into."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from deberta_dist import DebertaConfig, DebertaForMaskedLM
from deberta_dist.training.export import gather_full_weights, write_weights
from tests.harness import run_ranks
from tests.integration.parallel_run import SEED, Case, make_trainer


def gather(case: Case) -> dict[str, np.ndarray]:
    """Weights of a run that has not stepped."""
    trainer = make_trainer(case)
    full = gather_full_weights(trainer.parts.sharded_model, layout=trainer.parts.layout, mesh=trainer._mesh)
    return {name: weight.numpy() for name, weight in full.items()}


@pytest.mark.parametrize(
    "case",
    [Case(tensor=2, pipeline=2, data=2), Case(tensor=2, precision="bf16", model="v1")],
    ids=["tp2-pp2-dp2", "tp2-bf16"],
)
def test_a_fresh_run_holds_the_initial_values_bit_for_bit(case: Case) -> None:
    found = run_ranks(case.world_size, gather, case)
    assert all(rank == {} for rank in found[1:]), "only rank 0 has the weights"
    expected = dict(DebertaForMaskedLM(case.model_config(), seed=SEED).named_parameters())
    assert list(found[0]) == list(expected), "names in model order"
    for name, parameter in expected.items():
        weight = found[0][name]
        # 203 rows of vocabulary on shards of 128: padding is stripped.
        assert weight.dtype == np.float32 and weight.shape == tuple(parameter.shape)
        np.testing.assert_array_equal(weight, parameter.detach().numpy(), err_msg=name)


def write_from_views(case: Case, directory: str) -> Any:
    """One rank alone: its tensors are views of two flat buffers, which a file must not share."""
    trainer = make_trainer(case)
    full = gather_full_weights(trainer.parts.sharded_model, layout=trainer.parts.layout, mesh=trainer._mesh)
    tokenizer = Path(directory).with_name("any.model")
    tokenizer.write_bytes(b"a tokenizer")
    written = write_weights(full, config=case.model_config().to_dict(), tokenizer=tokenizer, directory=Path(directory))
    return str(written)


def test_written_weights_load_strictly(tmp_path: Path) -> None:
    case = Case()
    (written,) = run_ranks(1, write_from_views, case, str(tmp_path / "weights"))
    assert written == str(tmp_path / "weights")
    assert {path.name for path in tmp_path.iterdir()} == {"weights", "any.model"}, "the temporary directory is gone"
    assert (tmp_path / "weights" / "spm.model").read_bytes() == b"a tokenizer"
    config = DebertaConfig.from_dict(json.loads((tmp_path / "weights" / "config.json").read_text()))
    assert config == case.model_config()
    model = DebertaForMaskedLM(config, seed=SEED + 1)
    model.load_state_dict(load_file(tmp_path / "weights" / "model.safetensors"), strict=True)
    expected = DebertaForMaskedLM(config, seed=SEED).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    # Nothing of the flat buffers' padding came along.
    values = sum(p.numel() for p in model.parameters())
    assert (tmp_path / "weights" / "model.safetensors").stat().st_size < 4 * values + 20_000
