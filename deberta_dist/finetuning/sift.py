"""SiFT: virtual adversarial training on normalised embeddings, wrapped around a model from outside.

    x       = LayerNorm without scale and shift of the summed embeddings
    p       = logits(x)                                          clean pass
    delta   = clamp(N(0, noise), -2 noise, 2 noise)
    K times   delta += step_size g / (1e-6 + max |g| over the hidden size),
              g = d loss(logits(stop(x) + delta), stop(p)) / d delta
    result  = loss(logits(stop(x) + delta), p)                   gradient to both logits

x enters the embeddings' own LayerNorm, which changes nothing in a clean pass but makes perturbations of all words
comparable: their vectors differ in length, and the more the larger the model is. ``stop`` keeps the adversarial gradient
from the tables below the LayerNorm. Gradients with respect to delta come from autograd alone; no weight's requires_grad is
touched and no weight's gradient is computed in the K inner passes.

Source: paper section 4; microsoft/DeBERTa DeBERTa/sift/sift.py@4d7fe0bd. There the choice of the loss holds for the inner
passes alone, and with one label the loss is zero: here it holds for all, and one label means a squared difference.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deberta_dist.data.pinned import to_device
from deberta_dist.errors import ConfigError
from deberta_dist.kernels.dropout import mix_key
from deberta_dist.models.targets import REAL, require_tensor
from deberta_dist.values import SiftLoss

_NORMALISER_EPS = 1e-7
_STEP_EPS = 1e-6
_NOISE = 1 << 20  # sets the key of the noise apart from those of the passes

ClassifierForward = Callable[[int | None], Tensor]
"""Dropout key -> logits [B, num_labels] of one batch."""


def symmetric_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Both cross entropies [B]: gradient to the logits of each is the difference of the probabilities.

    The entropies are not subtracted, as published: equal logits give a positive number and no gradient.
    """
    _require_alike(student, teacher)
    student_log, teacher_log = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    return -(teacher_log.exp().detach() * student_log + student_log.exp().detach() * teacher_log).sum(-1)


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence of the student from the teacher [B]."""
    _require_alike(student, teacher)
    return F.kl_div(F.log_softmax(student, -1), F.log_softmax(teacher, -1), reduction="none", log_target=True).sum(-1)


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the logits [B]."""
    _require_alike(student, teacher)
    return (student - teacher).square().mean(-1)


def _require_alike(student: Tensor, teacher: Tensor) -> None:
    if student.dim() != 2:
        raise ValueError(f"logits: shape {list(student.shape)} given; SiFT compares logits [batch, labels]")
    require_tensor(teacher, name="logits", shapes=[student.shape], kinds=[REAL], user="a comparison with as many others")


LOSSES: Mapping[SiftLoss, Callable[[Tensor, Tensor], Tensor]] = {"symmetric_kl": symmetric_kl, "kl": kl, "mse": mse}


@dataclass(frozen=True)
class SiftSettings:
    """How SiFT perturbs; the defaults are the published code's.

    Attributes:
        step_size: Of delta, in units of the normalised embeddings (standard deviation 1).
        noise: Standard deviation of the initial delta.
        num_steps: Inner passes; each costs a forward and a backward pass to delta.
        weight: Of the adversarial loss beside the task's.
        loss: One of ``LOSSES``, for classes; regression takes ``mse``.
        same_dropout: One dropout mask for all passes instead of one each.
    """

    step_size: float = 1e-4
    noise: float = 1e-2
    num_steps: int = 1
    weight: float = 5.0
    loss: SiftLoss = "symmetric_kl"
    same_dropout: bool = False

    def __post_init__(self) -> None:
        for name in ("step_size", "noise", "weight"):
            if not getattr(self, name) >= 0.0:
                raise ConfigError(f"sift.{name} = {getattr(self, name)} must be at least 0")
        if self.num_steps < 1:
            raise ConfigError(f"sift.num_steps = {self.num_steps} must be at least 1")
        if self.loss not in LOSSES:
            raise ConfigError(f"sift.loss = {self.loss!r} is not one of {', '.join(LOSSES)}")


class Sift:
    """SiFT around one model.

    Args:
        layer_norm: The LayerNorm of the model's embeddings, ``deberta.embeddings.LayerNorm``.
    """

    def __init__(self, layer_norm: nn.Module, settings: SiftSettings) -> None:
        self._layer_norm, self._settings = layer_norm, settings

    def passes(self, forward: ClassifierForward, *, key: int, loss_scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """All passes over one batch.

        Args:
            forward: Runs the model; called ``num_steps`` + 2 times.
            key: Determines the noise, and the dropout of all passes; the same on every tensor-parallel rank. The clean
                pass has the dropout that a plain step with this key has.
            loss_scale: Of fp16: inner gradients are computed with it and divided by it.

        Returns:
            (clean logits, float32 [B, num_labels]; adversarial loss, float32 [B]), both with gradients.
        """
        kept: list[Tensor] = []

        def normalise(x: Tensor) -> Tensor:
            kept.append(F.layer_norm(x.float(), x.shape[-1:], eps=_NORMALISER_EPS).to(x.dtype))
            return kept[-1]

        with self._replacing(normalise):
            clean = forward(self._dropout_key(key, 0)).float()
        if len(kept) != 1:
            raise ValueError(
                f"the embeddings' LayerNorm that SiFT was given was called {len(kept)} times in a pass of the model, not once: "
                "make SiFT after the last change of the model's modules"
            )
        (embeddings,) = kept
        embeddings = embeddings.detach()
        measure = mse if clean.shape[-1] == 1 else LOSSES[self._settings.loss]
        delta = self._initial_delta(embeddings, key=mix_key(key, _NOISE))
        for number in range(1, self._settings.num_steps + 1):
            delta.requires_grad_()
            logits = self._perturbed(forward, embeddings, delta, key=self._dropout_key(key, number))
            loss = measure(logits, clean.detach()).sum() * loss_scale
            (gradient,) = torch.autograd.grad(loss, delta)
            delta = self._stepped(delta.detach(), gradient / loss_scale)
        logits = self._perturbed(forward, embeddings, delta, key=self._dropout_key(key, self._settings.num_steps + 1))
        return clean, measure(logits, clean)

    def _perturbed(self, forward: ClassifierForward, embeddings: Tensor, delta: Tensor, *, key: int) -> Tensor:
        with self._replacing(lambda _: (embeddings.float() + delta).to(embeddings.dtype)):
            return forward(key).float()

    def _initial_delta(self, embeddings: Tensor, *, key: int) -> Tensor:
        """Float32, the same wherever the key is: drawn on the CPU, so that devices agree as well."""
        noise = self._settings.noise
        generator = torch.Generator("cpu").manual_seed(key)
        drawn = torch.randn(embeddings.shape, generator=generator, dtype=torch.float32).mul_(noise)
        return to_device([drawn.clamp_(-2 * noise, 2 * noise)], embeddings.device)[0]

    def _stepped(self, delta: Tensor, gradient: Tensor) -> Tensor:
        """One step uphill; delta as it was where the gradient is not finite, decided without a look from the host."""
        largest = gradient.abs().amax(-1, keepdim=True)
        step = self._settings.step_size * gradient / (_STEP_EPS + largest)
        return torch.where(torch.isfinite(gradient.norm()), delta + step, delta)

    def _dropout_key(self, key: int, number: int) -> int:
        return key if number == 0 or self._settings.same_dropout else mix_key(key, number)

    @contextmanager
    def _replacing(self, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """What the LayerNorm gets is ``replace`` of it."""
        hook = self._layer_norm.register_forward_pre_hook(lambda _, inputs: replace(inputs[0]))
        try:
            yield
        finally:
            hook.remove()
