"""LoRA of the peft library on our models: every adapter learns, is saved, is loaded, and can be merged into the weights."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from deberta_dist.models.classification import DebertaForSequenceClassification
from deberta_dist.models.masked_lm import DebertaForMaskedLM
from deberta_dist.models.presets import preset

SIZES = {"num_hidden_layers": 2, "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 16}
IDS = torch.randint(5, 61, (2, 9), generator=torch.Generator().manual_seed(1))
MODELS = {
    # The head is new in a fine-tuning and trained as a whole.
    "classifier": (DebertaForSequenceClassification, torch.tensor([0, 1]), ["classifier"]),
    "masked": (DebertaForMaskedLM, torch.where(torch.arange(9) % 3 == 1, IDS, 0), None),
}
EVERYWHERE = ".*(_proj|dense|word_embeddings)"


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", ["tiny-v1", "tiny-v2"])
def test_lora_trains_everywhere_and_merges(name: str, kind: str, tmp_path: Path) -> None:
    make, labels, whole_modules = MODELS[kind]

    def base() -> nn.Module:
        return make(preset(name, **SIZES), seed=3).double().eval()

    def logits(model: nn.Module) -> Tensor:
        return model.eval()(IDS, labels=labels).logits.detach()

    before = logits(base())
    model = get_peft_model(base(), LoraConfig(r=2, target_modules=EVERYWHERE, modules_to_save=whole_modules)).double()
    torch.testing.assert_close(logits(model), before, rtol=1e-12, atol=1e-13)

    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapters = [name for name in trained if ".lora_" in name]
    projections = [m for n, m in base().named_modules() if isinstance(m, nn.Linear) and "classifier" not in n]
    assert len(adapters) == 2 * (len(projections) + 1)
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    for _ in range(2):  # what is behind a matrix of zeros learns from the second step on
        optimizer.zero_grad()
        model.train()(IDS, labels=labels).loss.backward()
        assert all(parameter.grad is not None for parameter in trained.values())
        optimizer.step()
    assert [name for name, parameter in trained.items() if not parameter.grad.abs().max() > 0] == []
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)

    after = logits(model)
    assert (after - before).abs().max() > 1e-3 * before.abs().max()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), str(tmp_path)).double()
    torch.testing.assert_close(logits(loaded), after, rtol=1e-12, atol=1e-13)
    merged = model.merge_and_unload()
    assert merged.state_dict().keys() == base().state_dict().keys()
    torch.testing.assert_close(logits(merged), after, rtol=1e-9, atol=1e-11)
