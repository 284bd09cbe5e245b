"""One product for several layers: where it is one, and the same numbers either way."""

import copy
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.fused_qkv import Entered, adjacent, join_, joint_linear
from deberta_dist.models.layers import DisentangledSelfAttention
from deberta_dist.models.presets import preset

IN, OUT = 5, 4


def layers() -> list[nn.Linear]:
    return [nn.Linear(IN, OUT, dtype=torch.float64) for _ in range(3)]


def gradients(outputs: tuple[Tensor, ...], wrt: list[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.arange(outputs[0].numel(), dtype=torch.float64).view_as(outputs[0])
    return torch.autograd.grad(sum((number + 1) * (weights * y).sum() for number, y in enumerate(outputs)), wrt)


def test_joined_or_not_the_numbers_are_the_same() -> None:
    apart = layers()
    joined = copy.deepcopy(apart)
    join_(joined)
    assert adjacent([layer.weight for layer in apart]) is None
    assert adjacent([layer.weight for layer in joined]).shape == (3 * OUT, IN)
    x = torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)
    found, expected = ((one, joint_linear(x, one)) for one in (joined, apart))
    for y, z in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(y, z, rtol=1e-14, atol=1e-14)
    assert adjacent(found[1], dim=-1) is not None, "there were several products"
    both = [gradients(outputs, [x, *(p for layer in one for p in layer.parameters())]) for one, outputs in (found, expected)]
    for y, z in zip(*both, strict=True):
        torch.testing.assert_close(y, z, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("number", [1, 3])
def test_an_input_that_can_be_made_again_is_not_kept(number: int) -> None:
    some = layers()[:number]
    half = torch.randn(2, 3, IN, dtype=torch.float64)
    x = (2 * half).requires_grad_()
    expected = gradients(joint_linear(x, some), [x, *(p for layer in some for p in layer.parameters())])

    class Doubled:
        def __init__(self, kept: Tensor) -> None:
            self.kept = kept

        def wait(self) -> Tensor:
            return 2 * self.kept

    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        outputs = joint_linear(Entered(x, half, Doubled), some)
    assert any(t is half for t in saved) and not any(t.data_ptr() == x.data_ptr() for t in saved)
    found = gradients(outputs, [x, *(p for layer in some for p in layer.parameters())])
    for y, z in zip(found, expected, strict=True):
        torch.testing.assert_close(y, z, rtol=1e-13, atol=1e-13)


def give_own_memory(layer: nn.Linear) -> None:
    layer.weight.data = layer.weight.detach().clone()


def give_another_weight(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight.detach().clone())


CHANGES: dict[str, Callable[[nn.Linear], object]] = {
    "forward hook": lambda layer: layer.register_forward_hook(lambda *_: None),
    "pre-hook": lambda layer: layer.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda layer: layer.register_full_backward_hook(lambda *_: None),
    "parametrisation": lambda layer: parametrize.register_parametrization(layer, "weight", nn.Identity()),
    "subclass": lambda layer: setattr(layer, "__class__", type("OfTheirOwn", (nn.Linear,), {})),
    "another weight": give_another_weight,
    "memory of its own": give_own_memory,
    "an adapter": lambda layer: LoraLinear(layer, "default", LoraConfig(), r=2),
}


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("change", CHANGES)
def test_each_changed_layer_switches_the_joint_product_off(change: str, number: int) -> None:
    some = layers()
    join_(some)
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    expected = joint_linear(x, some)
    assert adjacent(expected, dim=-1) is not None
    changed = CHANGES[change](some[number])
    if isinstance(changed, nn.Module) and not isinstance(changed, nn.Linear):
        some[number] = changed  # starts as the layer that it wraps
    found = joint_linear(x, some)
    assert adjacent(found, dim=-1) is None
    for y, z in zip(found, expected, strict=True):
        torch.testing.assert_close(y, z, rtol=1e-14, atol=1e-14)
    if change in ("another weight", "memory of its own"):
        some[number].weight.data.mul_(2)
        assert not torch.equal(joint_linear(x, some)[number], found[number])


def test_gradients_that_are_slices_of_one_tensor_are_not_copied() -> None:
    whole = torch.randn(2, 3, 2 * OUT)
    found = adjacent(whole.split(OUT, dim=-1), dim=-1)
    assert found.data_ptr() == whole.data_ptr() and torch.equal(found, whole)
    assert adjacent(list(whole.clone().split(OUT, dim=-1))[::-1], dim=-1) is None
    # Rows of two matrices that lie one behind the other are not rows of a wider one.
    behind = torch.randn(2, 3, OUT)
    assert adjacent([behind[0], behind[1]], dim=-1) is None


@pytest.mark.parametrize("shares_keys", [True, False])
def test_attention_keeps_its_projections_together(shares_keys: bool) -> None:
    config: DebertaConfig = preset("tiny-v2", share_att_key=shares_keys)

    def is_joined(module: DisentangledSelfAttention) -> bool:
        names = ["query_proj", "key_proj", "value_proj"]
        groups = [names] if shares_keys else [names, ["pos_key_proj", "pos_query_proj"]]
        return all(
            adjacent([getattr(getattr(module, name), leaf) for name in group]) is not None
            for group in groups
            for leaf in ("weight", "bias")
        )

    module = DisentangledSelfAttention(config)
    assert is_joined(module)
    assert is_joined(module.to(torch.bfloat16))
    state = {name: torch.randn_like(value) for name, value in module.state_dict().items()}
    module.load_state_dict(state)
    assert is_joined(module)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def test_a_second_derivative_is_that_of_separate_layers() -> None:
    apart = layers()
    joined = copy.deepcopy(apart)
    join_(joined)
    x = torch.randn(2, IN, dtype=torch.float64, requires_grad=True)
    found = []
    for one in (joined, apart):
        (first,) = torch.autograd.grad(sum(y.square().sum() for y in joint_linear(x, one)), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [x, *(layer.weight for layer in one)]))
    for y, z in zip(*found, strict=True):
        torch.testing.assert_close(y, z, rtol=1e-12, atol=1e-12)


def test_gradients_of_weights_that_nobody_asks_for_are_not_made() -> None:
    joined = layers()
    join_(joined)
    x = torch.randn(2, IN, dtype=torch.float64, requires_grad=True)
    outputs = joint_linear(x, joined)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(sum(y.sum() for y in outputs), x)
    assert counter.get_total_flops() == 2 * 2 * IN * 3 * OUT


def test_autocast_chooses_its_own_precision() -> None:
    joined = [layer.float() for layer in layers()]
    join_(joined)
    x = torch.randn(2, IN, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = joint_linear(x, joined)
        assert outputs[0].dtype == F.linear(x, joined[0].weight).dtype == torch.bfloat16
    outputs[0].float().sum().backward()
    assert x.grad.dtype == torch.float32
