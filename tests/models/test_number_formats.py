"""Models of several number formats: right where torch can, and else told which modules have which."""

import re

import pytest
import torch
from torch import nn

from deberta_dist.models.classification import DebertaForReplacedTokenDetection, DebertaForSequenceClassification
from deberta_dist.models.encoder import DebertaModel
from deberta_dist.models.masked_lm import DebertaForMaskedLM
from deberta_dist.models.presets import preset

SIZES = {"num_hidden_layers": 2, "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 16}
IDS = torch.randint(5, 61, (2, 9), generator=torch.Generator().manual_seed(1))
HEADS = {
    DebertaForMaskedLM: "lm_predictions",
    DebertaForSequenceClassification: "classifier",
    DebertaForReplacedTokenDetection: "mask_predictions",
}


@pytest.mark.parametrize(
    "parts", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float64)]
)
@pytest.mark.parametrize("kind", HEADS)
def test_a_head_of_another_format_is_told(kind: type[nn.Module], parts: tuple[torch.dtype, torch.dtype]) -> None:
    model = kind(preset("tiny-v2", **SIZES)).eval().to(parts[0])
    model.get_submodule(HEADS[kind]).to(parts[1])
    expected = [re.escape(str(part).removeprefix("torch.")) for part in parts]
    with pytest.raises(
        ValueError, match=rf"{expected[0]}: deberta\.embeddings.*{expected[1]}: {HEADS[kind]}.*model\.to"
    ) as caught:
        model(IDS)
    assert "\n" not in str(caught.value)
    model.to(torch.float32)
    assert model(IDS).logits.dtype == torch.float32


def test_a_layer_of_another_format_is_told() -> None:
    model = DebertaModel(preset("tiny-v2", **SIZES)).eval()
    model.encoder.layer[1].attention.self.key_proj.double()
    with pytest.raises(ValueError, match=r"float64: encoder\.layer\.1\.attention\.self\.key_proj\)"):
        model(IDS)


def test_what_torch_can_do_is_done() -> None:
    """Under autocast, and normalisations in float32 among 16-bit products."""
    model = DebertaForSequenceClassification(preset("tiny-v2", **SIZES)).eval()
    expected = model(IDS).logits
    model.deberta.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(IDS).logits.float(), expected, rtol=0.1, atol=0.02)


def test_other_errors_are_left_as_they_are() -> None:
    model = DebertaModel(preset("tiny-v2", **SIZES)).eval()
    model.encoder.layer[1].double()

    def fails(*_: object) -> None:
        raise RuntimeError("out of memory")

    model.encoder.layer[0].register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="^out of memory"):
        model(IDS)
