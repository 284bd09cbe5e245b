"""Masked language models of several implementations with the same weights on one batch: what `step` measures."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.stopwatch import TimedPass
from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.flops import forward_flops
from deberta_dist.models.masked_lm import DebertaForMaskedLM
from deberta_dist.models.targets import find_targets

OURS = "ours"
IGNORED = -100
COMPARED = (
    "word_embeddings.weight",
    "rel_embeddings.weight",
    "query_proj.weight",
    "value_proj.weight",
    "output.dense.weight",
)


class ContestStep:
    """One batch and the models that are trained on it.

    Args:
        config: The configuration of all models.
        shape: (B, S), sequences and tokens of the batch.
        device: Where all models run.
        dtype: That of weights and hidden states.
    """

    def __init__(self, config: DebertaConfig, *, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(5, config.vocab_size, shape, generator=generator)
        is_target = torch.rand(shape, generator=generator) < 0.15
        is_target[:, 1] = True
        self._ids, self._mask = ids.to(device), torch.ones_like(ids).to(device)
        labels = torch.where(is_target, ids, 0)
        self._labels, self._targets = labels.to(device), find_targets(is_target, labels).to(device)
        self._config, self._device, self._dtype = config, device, dtype
        self.model = DebertaForMaskedLM(config, seed=1).to(device, dtype).train()
        self._models: dict[str, nn.Module] = {OURS: self.model}

    def ours(self) -> TimedPass:
        """This package's model as it is trained: the last layer for targets alone, which the loader has found."""
        return self._contestant(self.model, lambda: self._own_loss(dropout_key=1))

    def hugging_face(self) -> TimedPass:
        """transformers' model."""
        model = self._add(peers.HUGGING_FACE, peers.hugging_face_masked_lm(self._config, self.model.state_dict()))
        labels = self._labels.masked_fill(self._labels == 0, IGNORED)
        return self._contestant(model, lambda: model(self._ids, attention_mask=self._mask, labels=labels).loss)

    def published(self, checkout: Path) -> TimedPass:
        """The published model."""
        model = self._add(peers.PUBLISHED, peers.published_masked_lm(checkout, self._config, self.model.state_dict()))
        return self._contestant(model, lambda: self._published_loss(model))

    @property
    def flops(self) -> float:
        """Of the model's products, forward and backward (`planning.flops`)."""
        batch, length = self._ids.shape
        share = (self._labels > 0).sum().item() / self._labels.numel()
        per_token = forward_flops(self._config, max_seq_length=length, micro_batch_size=batch, mask_probability=share)
        return per_token.training * batch * length

    def large_product(self) -> tuple[TimedPass, float]:
        """All tokens times the feed-forward's first weight, and its FLOPs."""
        tokens, width, inner = self._ids.numel(), self._config.hidden_size, self._config.intermediate_size
        left, right = (
            torch.ones(*shape, device=self._device, dtype=self._dtype) for shape in ((tokens, width), (width, inner))
        )
        out = left.new_empty(tokens, inner)
        repeats = 10
        return TimedPass(lambda: [torch.mm(left, right, out=out) for _ in range(repeats)]), repeats * 2.0 * left.numel() * inner

    def hidden_states(self) -> dict[str, list[Tensor]]:
        """The last layer's of ours and of Hugging Face's, without dropout."""
        found = {}
        with torch.no_grad():
            for name in (OURS, peers.HUGGING_FACE):
                model = self._models[name].eval()
                found[name] = [model.deberta(self._ids, attention_mask=self._mask).last_hidden_state]
                model.train()
        return found

    def gradients(self) -> dict[str, list[Tensor]]:
        """Loss and gradients of large weights of those that compute the same, without dropout."""
        losses = {OURS: lambda _: self._own_loss(dropout_key=None)}
        if peers.PUBLISHED in self._models:
            losses[peers.PUBLISHED] = self._published_loss
        found = {}
        for name, loss_of in losses.items():
            model = self._models[name].eval()
            loss = loss_of(model)
            loss.backward()
            grads = [p.grad for n, p in model.named_parameters() if n.endswith(COMPARED)]
            found[name] = [loss.detach(), *(grad.clone() for grad in grads)]
            model.zero_grad()
            model.train()
        return found

    def tensors(self, name: str) -> list[Tensor]:
        """What is there whether or not there will be a backward pass."""
        return [self._ids, self._mask, self._labels, *self._targets.tensors(), *self._models[name].parameters()]

    def _add(self, name: str, model: nn.Module) -> nn.Module:
        self._models[name] = model.to(self._device, self._dtype).train()
        return model

    def _own_loss(self, *, dropout_key: int | None) -> Tensor:
        loss_sum, _, num_targets = self.model.forward_stage(
            None,
            input_ids=self._ids,
            attention_mask=self._mask,
            targets=self._targets,
            layers=range(self._config.num_hidden_layers),
            dropout_key=dropout_key,
        )[0]
        return loss_sum / num_targets

    def _published_loss(self, model: nn.Module) -> Tensor:
        return model(self._ids, self._mask, self._labels)["loss"].mean()

    def _contestant(self, model: nn.Module, loss: Any) -> TimedPass:
        return TimedPass(loss, lambda value: value.backward(), model.zero_grad)
