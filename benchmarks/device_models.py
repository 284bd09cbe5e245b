"""Large models with random weights, made on the device that measures them, and the steps that train them.

A run draws its initial weights on the CPU, one number after the other, so that every layout starts with the same ones:
for the 1.5B that takes minutes. A benchmark needs numbers of the right size, and fast.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from deberta_dist.models.attention_dispatch import describe_attention, require_attention, set_attention
from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.fused_qkv import add_gradients_, set_main_grads
from deberta_dist.models.initialisation import without_memory
from deberta_dist.models.layers import ResidualOutput
from deberta_dist.models.masked_lm import DebertaForMaskedLM

MAX_GRADIENT_NORM = 1.0


@torch.no_grad()
def fill_(named: Iterable[tuple[str, Tensor]], *, std: float, seed: int = 0) -> None:
    """Fills tensors by their published names where they lie: ones for LayerNorm weights, zeros for biases, else N(0, std)."""
    generator: torch.Generator | None = None
    for name, tensor in named:
        if name.endswith("bias"):
            tensor.zero_()
        elif name.endswith("LayerNorm.weight"):
            tensor.fill_(1.0)
        else:
            generator = generator or torch.Generator(tensor.device).manual_seed(seed)
            tensor.normal_(0.0, std, generator=generator)


def random_masked_lm(config: DebertaConfig, *, device: torch.device, dtype: torch.dtype) -> DebertaForMaskedLM:
    """The model in training mode, its weights made on the device."""
    with without_memory():
        model = DebertaForMaskedLM(config)
    model = model.to(dtype).to_empty(device=device).train()
    fill_(model.named_parameters(), std=config.initializer_range)
    return model


def attend_by(wish: str, model: nn.Module, config: DebertaConfig, *, dtype: torch.dtype, device: torch.device) -> None:
    """Makes a model of ours attend as ``--attention`` asks, and prints who does it: a warning if a GPU does without the fused.

    Raises:
        ConfigError: the fused attention is asked for and cannot be had.
    """
    require_attention(wish, config, dtype=dtype, device=device, where="--attention")
    set_attention(model, wish)
    print(describe_attention(wish, config, dtype=dtype, device=device))


def sum_in_float32(model: nn.Module, *, products_add: bool = False) -> list[Tensor]:
    """Gives every parameter a float32 gradient to add to, as a run's have; returns these. See `PlainTraining`."""
    sums = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.grad_dtype = None if products_add else torch.float32
        if not products_add:
            parameter.grad = sums[name]
    set_main_grads(model, sums if products_add else None)
    return list(sums.values())


def join_residuals(model: nn.Module, *, joins: bool = True) -> None:
    """Trains a model as ``training.compile`` does, or no more."""
    for module in model.modules():
        if isinstance(module, ResidualOutput):
            module.joined = joins


class PlainTraining:
    """Optimizer steps of any model in mixed precision, without DeepSpeed: the same for ours and for peers.

    The weights of the passes are rounded copies of float32 masters; gradients are float32; AdamW behind clipping.

    Args:
        model: Its weights are those of the passes.
        loss: Of one micro-batch; a scalar with a gradient.
        products_add: The products of the backward pass add weights' gradients to the sums, as ours can and do in a run on a
            GPU (``parallel/sharded_model.py``); by default autograd adds them.
    """

    def __init__(self, model: nn.Module, loss: Callable[[], Tensor], *, products_add: bool = False) -> None:
        self._loss, self._model = loss, model
        self._parameters = list(model.parameters())
        self._gradients = sum_in_float32(model, products_add=products_add)
        self._products_add = products_add
        self._masters = [parameter.detach().to(torch.float32, copy=True) for parameter in self._parameters]
        for master, gradient in zip(self._masters, self._gradients, strict=True):
            master.requires_grad_().grad = gradient
        self._optimizer = torch.optim.AdamW(self._masters, lr=1e-4, eps=1e-6, fused=True)

    @property
    def num_parameters(self) -> int:
        """Number of the model's weights."""
        return sum(parameter.numel() for parameter in self._parameters)

    def passes(self) -> Tensor:
        """Forward and backward of one micro-batch, whose gradients are added to those that are there; returns its loss."""
        loss = self._loss()
        loss.backward()
        if self._products_add:
            add_gradients_(self._model)
        return loss.detach()

    def step(self) -> Tensor:
        """A whole step of one micro-batch; returns its loss."""
        torch._foreach_zero_(self._gradients)
        loss = self.passes()
        torch.nn.utils.clip_grad_norm_(self._masters, MAX_GRADIENT_NORM, foreach=True)
        self._optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self._parameters, self._masters)
        return loss
