"""Where tensors lie in the flat parameters."""

from pathlib import Path

import pytest
import torch

from deberta_dist.config import load_config
from deberta_dist.parallel.flat_layout import ALIGNMENT, lay_out
from deberta_dist.parallel.layout import flat_layout
from deberta_dist.parallel.network import is_decayed, is_not_decayed
from deberta_dist.planning.plan import check_plan


@pytest.mark.parametrize("data_parallel_size", [1, 2, 3, 8])
def test_flat_places_are_aligned_and_do_not_overlap(data_parallel_size: int) -> None:
    shapes = {"a.weight": (3, 5), "a.bias": (65,), "b.weight": (64,), "c.LayerNorm.weight": (1,), "d.weight": (7, 2, 3)}
    layout = lay_out(shapes, groups=(is_decayed, is_not_decayed), data_parallel_size=data_parallel_size)
    assert list(layout.places) == list(shapes)
    flats = [torch.zeros(size) for size in layout.sizes]
    for name, view in layout.views(flats).items():
        index, offset, shape = layout.places[name]
        assert shape == shapes[name] == tuple(view.shape)
        assert index == (0 if is_decayed(name) else 1)
        assert offset % ALIGNMENT == 0
        view += 1  # a view, not a copy
    assert [flat.max().item() for flat in flats] == [1.0, 1.0], "two tensors overlap"
    assert sum(flat.sum().item() for flat in flats) == sum(torch.Size(shape).numel() for shape in shapes.values())
    for size in layout.sizes:
        assert size % (ALIGNMENT * data_parallel_size) == 0, "a shard is not aligned"


def test_an_empty_group_is_one_row_of_padding() -> None:
    layout = lay_out({"a.weight": (2, 2)}, groups=(is_decayed, is_not_decayed), data_parallel_size=4)
    assert layout.sizes == (ALIGNMENT * 4, ALIGNMENT * 4)
    assert lay_out({}, groups=(is_decayed, is_not_decayed), data_parallel_size=2).sizes == (ALIGNMENT * 2,) * 2


def test_every_name_belongs_to_exactly_one_group() -> None:
    for groups in ((lambda name: False,), (lambda name: True, lambda name: True)):
        with pytest.raises(ValueError):
            lay_out({"a": (1,)}, groups=groups, data_parallel_size=1)


def test_projections_that_make_one_product_lie_one_behind_the_other() -> None:
    launcher = Path(__file__).parents[2] / "launchers" / "pretrain_1.5b.toml"
    sizes = ("--parallel.tensor_parallel_size=2", "--parallel.pipeline_parallel_size=4")
    plan = check_plan(load_config(launcher, sizes), world_size=64)
    layout = flat_layout(plan.layout, pipeline_rank=1, tensor_rank=1, data_parallel_size=8)
    prefix = "deberta.encoder.layer.20.attention.self."
    for leaf in ("weight", "bias"):
        places = [layout.places[f"{prefix}{name}_proj.{leaf}"] for name in ("query", "key", "value")]
        for (index, offset, shape), (next_index, next_offset, _) in zip(places, places[1:], strict=False):
            assert (next_index, next_offset) == (index, offset + torch.Size(shape).numel())
