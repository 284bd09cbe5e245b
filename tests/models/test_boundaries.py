"""What other rooms rely on to cut the model: where ``enter`` is applied, and heads counted from the projections."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn

from deberta_dist.kernels import RelativePositions
from deberta_dist.models.masked_lm import DebertaForMaskedLM
from deberta_dist.models.presets import preset


def test_every_region_is_entered_once_per_tensor(batch):
    config = preset("tiny-v2")
    model = DebertaForMaskedLM(config)
    entered: Counter[str] = Counter()
    for name, module in model.named_modules():
        if name.endswith(".enter"):
            assert type(module) is nn.Identity
            module.register_forward_hook(lambda *_, name=name: entered.update([name]))
    model(*batch(config), dropout_key=1)
    layer = "deberta.encoder.layer.{}.attention.self.enter", "deberta.encoder.layer.{}.intermediate.enter"
    expected = {name.format(number): 1 for number in range(3) for name in layer}
    # The decoder: its hidden states once, and the queries of each of two passes.
    expected |= {layer[0].format(3): 3, layer[1].format(3): 2, "lm_predictions.lm_head.enter": 1}
    assert entered == expected


def test_tokens_are_chosen_where_the_table_of_the_plan_says():
    """One identity each: beside the embeddings' tables, in the convolution, and before the decoder."""
    model = DebertaForMaskedLM(preset("tiny-v2"))
    leaves = ("own_tokens", "halo", "whole_sequence")
    found = {name for name, module in model.named_modules() if name.endswith(leaves) and type(module) is nn.Identity}
    convolution = "deberta.encoder.conv."
    assert found == {"deberta.embeddings.own_tokens", f"{convolution}own_tokens", f"{convolution}halo", "whole_sequence"}


@pytest.mark.parametrize("name", ["tiny-v1", "tiny-v2"])
def test_heads_can_be_split_over_two(randomise, relative_error, name):
    """Each half holds half of the heads of every projection; the halves' outputs and table gradients add up."""
    config = preset(name)
    layer = randomise(DebertaForMaskedLM(config)).deberta.encoder.layer[0].eval()
    halves = [_half_of(layer, number) for number in range(2)]
    hidden = torch.randn(2, 10, 64, generator=torch.Generator().manual_seed(1))
    rows = torch.randint(0, config.num_position_rows, (21,), generator=torch.Generator().manual_seed(2))
    positions = RelativePositions(rows)

    def attended(part: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        attention = part.attention.self
        rel_RD = torch.linspace(-1, 1, config.num_position_rows * 64).view(-1, 64).requires_grad_()
        memory = attention.memory(hidden, rel_RD=rel_RD, dropout_key=None)
        context, _ = attention.attend(attention.queries(hidden), memory, positions=positions, mask=None, dropout_key=None)
        output = part.attention.output.dense(context)
        return output, torch.autograd.grad(output.sum(), rel_RD)[0]

    (whole, whole_gradient), first, second = attended(layer), *map(attended, halves)
    assert relative_error(first[0] + second[0], whole) < 1e-5
    assert relative_error(first[1] + second[1], whole_gradient) < 1e-5


def _half_of(layer: nn.Module, number: int) -> nn.Module:
    half = copy.deepcopy(layer)
    for name, module in half.named_modules():
        if name.endswith("_proj"):
            module.weight = nn.Parameter(module.weight.chunk(2)[number].clone())
            module.bias = nn.Parameter(module.bias.chunk(2)[number].clone())
    dense = half.attention.output.dense
    dense.weight = nn.Parameter(dense.weight.chunk(2, dim=1)[number].clone())
    dense.bias = nn.Parameter(dense.bias / 2)
    return half
