"""SiFT against the published numbers, and what it adds to them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from deberta_dist import DebertaForSequenceClassification, preset
from deberta_dist.errors import ConfigError
from deberta_dist.finetuning.sift import LOSSES, Sift, SiftSettings, kl, mse, symmetric_kl
from tests.models.conftest import _load
from tests.models.test_golden import TOLERANCE, _compare_gradients

PUBLISHED = SiftSettings(step_size=1e-2, noise=1e-1)  # of the golden files


def largest_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


class WithKnownNoise(Sift):
    """Begins with a given perturbation and keeps the last."""

    initial: Tensor
    last: Tensor

    def _initial_delta(self, embeddings: Tensor, *, key: int) -> Tensor:
        return self.initial.to(embeddings.dtype)

    def _stepped(self, delta: Tensor, gradient: Tensor) -> Tensor:
        self.last = super()._stepped(delta, gradient)
        return self.last


@pytest.mark.parametrize("name", ["v2_sift_classification", "v1_position_biased_classification"])
def test_published_numbers(name: str) -> None:
    """In float64: the direction of a step comes from small differences, and the file's own are known to float32."""
    file = _load(name)
    model = file.model().double()
    input_ids, attention_mask, labels = file.inputs
    sift = WithKnownNoise(model.deberta.embeddings.LayerNorm, PUBLISHED)
    sift.initial = file.tensors["in.sift.initial_delta"]
    clean, adversarial = sift.passes(lambda key: model(input_ids, attention_mask).logits, key=1)
    assert largest_error(clean, file.tensors["out.sift.clean_logits"]) < TOLERANCE
    assert largest_error(F.cross_entropy(clean, labels), file.tensors["out.sift.clean_loss"]) < TOLERANCE
    assert largest_error(sift.last, file.tensors["out.sift.updated_delta"]) < TOLERANCE
    assert largest_error(adversarial.mean(), file.tensors["out.sift.adversarial_loss"]) < TOLERANCE
    (F.cross_entropy(clean, labels) + adversarial.mean()).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    _compare_gradients(file, found, largest_error)


@pytest.fixture
def model() -> DebertaForSequenceClassification:
    torch.manual_seed(0)
    return DebertaForSequenceClassification(preset("tiny-v2"), num_labels=3).train()


def forward_of(model: nn.Module, *, seen: list[int | None] | None = None) -> Callable[[int | None], Tensor]:
    """Logits of a fixed batch."""
    ids = torch.randint(4, 512, (4, 20), generator=torch.Generator().manual_seed(3))

    def forward(key: int | None) -> Tensor:
        if seen is not None:
            seen.append(key)
        return model(ids, torch.ones_like(ids), dropout_key=key).logits

    return forward


def sift_of(model: nn.Module, **settings) -> Sift:
    return Sift(model.deberta.embeddings.LayerNorm, SiftSettings(**settings))


def test_the_clean_pass_is_the_plain_one(model) -> None:
    forward = forward_of(model)
    clean, adversarial = sift_of(model).passes(forward, key=7)
    torch.testing.assert_close(clean, forward(7), rtol=1e-4, atol=1e-6)
    assert adversarial.shape == (4,) and not model.deberta.embeddings.LayerNorm._forward_pre_hooks


def test_everything_follows_from_the_key(model) -> None:
    forward = forward_of(model)
    a, b, c = (sift_of(model).passes(forward, key=key)[1] for key in (7, 7, 8))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_dropout_masks_of_the_passes(model) -> None:
    for same in (False, True):
        seen: list[int | None] = []
        sift_of(model, num_steps=2, same_dropout=same).passes(forward_of(model, seen=seen), key=7)
        assert len(seen) == 4 and seen[0] == 7 and len(set(seen)) == (1 if same else 4)


def test_inner_passes_leave_weights_alone(model) -> None:
    """No gradient before the caller's backward pass, and every weight asks for one as before."""
    frozen = model.pooler.dense.weight.requires_grad_(False)
    asks = {name: p.requires_grad for name, p in model.named_parameters()}
    clean, adversarial = sift_of(model).passes(forward_of(model), key=7)
    assert all(p.grad is None for p in model.parameters())
    (clean.sum() + adversarial.sum()).backward()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == asks and frozen.grad is None


def test_the_adversarial_gradient_reaches_the_tables_by_the_clean_logits_alone(model) -> None:
    outputs: list[Tensor] = []
    plain = forward_of(model)

    def forward(key: int | None) -> Tensor:
        outputs.append(plain(key))
        return outputs[-1]

    table = model.deberta.embeddings.word_embeddings.weight
    clean, adversarial = sift_of(model).passes(forward, key=7)
    (found,) = torch.autograd.grad(adversarial.sum(), table, retain_graph=True)
    upstream = (clean.softmax(-1) - outputs[-1].softmax(-1)).detach()
    (expected,) = torch.autograd.grad(clean, table, grad_outputs=upstream)
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected)


def test_one_label_is_not_silently_zero() -> None:
    model = DebertaForSequenceClassification(preset("tiny-v2"), num_labels=1).eval()
    _, adversarial = sift_of(model, noise=0.5).passes(forward_of(model), key=7)
    assert (adversarial > 0).all()
    adversarial.sum().backward()
    assert model.classifier.weight.grad.abs().max() > 0


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_climbs(loss: str) -> None:
    """A step of the perturbation makes the predictions differ more than noise alone does."""
    model = DebertaForSequenceClassification(preset("tiny-v2"), num_labels=3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    plain, distances = forward_of(model), []
    for step in (0.0, 1e-2):
        outputs: list[Tensor] = []

        def forward(key: int | None, outputs: list[Tensor] = outputs) -> Tensor:
            outputs.append(plain(key))
            return outputs[-1]

        sift_of(model, loss=loss, noise=1e-2, step_size=step, num_steps=3).passes(forward, key=7)
        distances.append(kl(outputs[-1], outputs[0]))
    assert (distances[1] > distances[0]).all()


def test_gradient_of_the_symmetric_loss() -> None:
    student, teacher = (torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    symmetric_kl(student, teacher).sum().backward()
    p, q = student.softmax(-1), teacher.softmax(-1)
    torch.testing.assert_close(student.grad, p - q)
    torch.testing.assert_close(teacher.grad, q - p)
    assert mse(student, student).abs().max() == 0.0


@pytest.mark.parametrize("loss", LOSSES)
def test_logits_of_other_shapes_are_refused(loss: str) -> None:
    student = torch.randn(5, 3)
    for teacher in (student[:1], student[:, :1], student[0], student.argmax(-1), student.argmax(-1)[:, None].expand(5, 3)):
        with pytest.raises(ValueError, match="^logits: shape .* takes shape .5, 3. of floating point"):
            LOSSES[loss](student, teacher)
    with pytest.raises(ValueError, match="^logits: .* .batch, labels."):
        LOSSES[loss](student[0], student[0])


def test_a_layer_norm_that_is_not_called_is_refused(model) -> None:
    sift = sift_of(model)
    model.deberta.embeddings.LayerNorm = nn.LayerNorm(model.config.hidden_size)
    with pytest.raises(ValueError, match="called 0 times"):
        sift.passes(forward_of(model), key=7)


def test_a_gradient_that_is_not_finite_changes_nothing(model) -> None:
    delta, gradient = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    sift = sift_of(model)
    assert not torch.equal(sift._stepped(delta, gradient), delta)
    for bad in (float("nan"), float("inf")):
        gradient[1, 2, 3] = bad
        assert torch.equal(sift._stepped(delta, gradient), delta)


def test_bf16_keeps_the_perturbation_in_float32(model) -> None:
    model = model.to(torch.bfloat16)
    clean, adversarial = sift_of(model).passes(forward_of(model), key=7)
    assert clean.dtype == adversarial.dtype == torch.float32
    adversarial.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_loss_scale_does_not_move_the_perturbation(model) -> None:
    forward = forward_of(model)
    a, b = (sift_of(model, step_size=1e-2).passes(forward, key=7, loss_scale=scale)[1] for scale in (1.0, 1024.0))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_cost_is_eight_thirds_of_a_plain_step() -> None:
    """Three forwards, one backward to the perturbation alone, one through both graphs: 3 + 1 + 4 against 1 + 2."""
    model = DebertaForSequenceClassification(preset("tiny-v2"), num_labels=3)
    forward = forward_of(model)
    with FlopCounterMode(display=False) as plain:
        forward(7).sum().backward()
    with FlopCounterMode(display=False) as sift:
        clean, adversarial = sift_of(model).passes(forward, key=7)
        (clean.sum() + adversarial.sum()).backward()
    assert sift.get_total_flops() <= 8 / 3 * plain.get_total_flops() * 1.02


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"step_size": -1.0}, "step_size"), ({"noise": float("nan")}, "noise"), ({"num_steps": 0}, "num_steps"),
     ({"loss": "symmetric-kl"}, "sift.loss = 'symmetric-kl' is not one of symmetric_kl, kl, mse")],
)  # fmt: skip
def test_settings_are_checked(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SiftSettings(**settings)
