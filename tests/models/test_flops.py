"""The FLOPs formula against the products that torch itself counts in the real model, to the last one."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from deberta_dist import DebertaForMaskedLM, preset
from deberta_dist.kernels import attention
from deberta_dist.kernels.attention import reference_attention
from deberta_dist.models.flops import device_peak_flops, forward_flops

BATCH, LENGTH, TARGETS = 3, 64, 8


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tiny-v1", {}),
        ("tiny-v2", {}),
        ("tiny-v1", {"position_biased_input": True}),
        ("tiny-v2", {"position_biased_input": True}),
        ("tiny-v2", {"decoder": "plain"}),
        ("tiny-v1", {"pos_att_type": "c2p"}),
        ("tiny-v2", {"pos_att_type": "p2c"}),
        ("tiny-v2", {"attention_head_size": 24}),
        ("tiny-v2", {"conv_groups": 4, "conv_kernel_size": 5}),
    ],
)
def test_formula_counts_every_product_of_the_model(name: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # The model's products are the formula's; the portable attention makes some more to avoid a gather.
    monkeypatch.setattr(attention, "portable_attention", lambda *arguments: reference_attention(*arguments)[0])
    config = preset(name, **changes)
    model = DebertaForMaskedLM(config, seed=1).eval()
    ids = torch.randint(4, config.vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    # As many targets in each row: the decoder pads its queries to the fullest one, which the formula cannot know.
    labels = torch.where(torch.arange(LENGTH) < TARGETS, ids, 0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids, torch.ones_like(ids), labels)
    flops = forward_flops(config, max_seq_length=LENGTH, micro_batch_size=BATCH, mask_probability=TARGETS / LENGTH)
    assert flops.forward * BATCH * LENGTH == pytest.approx(counter.get_total_flops(), rel=1e-12)
    assert flops.training == 3 * flops.forward


@pytest.mark.parametrize(("micro_batch", "billions"), [(1, 10.53), (2, 9.85), (4, 9.51), (8, 9.34), (16, 9.26), (32, 9.215)])
def test_largest_model_per_token(micro_batch: int, billions: float) -> None:
    flops = forward_flops(preset("v2-xxlarge"), max_seq_length=512, micro_batch_size=micro_batch, mask_probability=0.15)
    assert flops.training == pytest.approx(billions * 1e9, abs=0.005e9)


def test_flops_of_one_layer_by_hand() -> None:
    by_layer = forward_flops(preset("v2-xxlarge"), max_seq_length=512, micro_batch_size=4, mask_probability=0.15).by_layer
    hidden, rows, length = 1536, 512, 512
    weights = 4 * hidden * hidden + 2 * hidden * 4 * hidden
    scores = 2 * length * hidden + 2 * rows * hidden  # QK and PV; c2p and p2c, each over the whole table
    table = 2 * rows * hidden * hidden / (4 * length)  # its two projections, shared by the micro-batch
    assert by_layer[1] == pytest.approx(2 * (weights + scores + table), rel=1e-12)
    assert by_layer[0] - by_layer[1] == 2 * hidden * hidden * 3  # the convolution
    assert len(by_layer) == 48 and len(set(by_layer[1:-1])) == 1


def test_device_peaks() -> None:
    assert device_peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert device_peak_flops("NVIDIA A100-SXM4-40GB") == 312e12
    assert device_peak_flops("cpu") is None
