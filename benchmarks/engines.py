"""DeepSpeed's own ZeRO-3 engine around a plain model, data parallel: the peer of whole optimizer steps."""

from typing import Any

import torch
from torch import Tensor, nn

from deberta_dist.models.masked_lm import DebertaForMaskedLM
from deberta_dist.parallel.network import is_decayed
from deberta_dist.parallel.zero import import_deepspeed

IGNORED = -100


class LossOnly(DebertaForMaskedLM):
    """The plain model with the loss as its output: DeepSpeed's hooks find no tensor in a dataclass."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        return super().forward(input_ids, attention_mask, labels).loss


class HuggingFaceLoss(nn.Module):
    """Their masked language model with our arguments, and the loss as its output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        labels = labels.masked_fill(labels == 0, IGNORED)
        return self.model(input_ids, attention_mask=attention_mask, labels=labels).loss


def zero3_engine(model: nn.Module, settings: dict[str, Any], *, learning_rate: float) -> Any:
    """The engine with AdamW, which decays what this package decays. Collective."""
    decayed = [parameter for name, parameter in model.named_parameters() if is_decayed(name)]
    others = [parameter for name, parameter in model.named_parameters() if not is_decayed(name)]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, fused=torch.cuda.is_available())
    engine, *_ = import_deepspeed().initialize(model=model, optimizer=optimizer, config=settings)
    return engine


def take_step(engine: Any, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, *, micro_batch_size: int) -> float:
    """One optimizer step over micro-batches of the rows; the mean of their losses on this rank."""
    losses = []
    for first in range(0, len(labels), micro_batch_size):
        rows = slice(first, first + micro_batch_size)
        loss = engine(input_ids[rows], attention_mask[rows], labels[rows])
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    return torch.stack(losses).mean().item()
