"""Products that add weights' gradients to float32 sums: the gradients that autograd adds up, and nothing where none is asked for."""

import copy

import pytest
import torch
from torch import Tensor, nn

from deberta_dist import DebertaForMaskedLM
from deberta_dist.models.fused_qkv import Linear, join_, joint_linear, linear, main_grad, set_main_grads
from deberta_dist.models.masked_lm import DebertaForMaskedLM as Model
from deberta_dist.models.presets import preset

CONFIGS = {
    "v1": preset("tiny-v1"),
    "v2": preset("tiny-v2"),
    "own table projections": preset("tiny-v2", share_att_key=False),
    "biased": preset("tiny-v2", position_biased_input=True, embedding_size=32, type_vocab_size=2),
}


def give_main_grads(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    for parameter in model.parameters():
        parameter.grad_dtype = None
    set_main_grads(model, {n: torch.zeros_like(p, dtype=dtype) for n, p in model.named_parameters()})


def main_grads(model: nn.Module) -> dict[str, Tensor]:
    """The sums by the parameters' names."""
    return {
        f"{name}.{leaf}".removeprefix("."): total
        for name, module in model.named_modules()
        for leaf, total in vars(module).get("main_grads", {}).items()
    }


def totals(model: nn.Module) -> dict[str, Tensor]:
    """What products have added, and what is left to be added."""
    left = {n: 0 if p.grad is None else p.grad for n, p in model.named_parameters()}
    return {name: total + left[name] for name, total in main_grads(model).items()}


def batch(config, *, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, config.vocab_size, (2, 11), generator=generator)
    ids[1, -3:] = 0
    labels = torch.where(torch.rand(2, 11, generator=generator) < 0.3, ids, 0)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


def losses(model: Model, config, inputs: dict[str, Tensor]) -> Tensor:
    layers = range(config.num_hidden_layers)
    return model.forward_stage(None, **inputs, layers=layers, dropout_key=3)[0, 0]


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_sums_of_two_micro_batches(name: str, recompute: str) -> None:
    config = CONFIGS[name]
    plain = DebertaForMaskedLM(config).double()
    plain.recompute, plain.vocabulary_chunks = recompute, 2
    adding = copy.deepcopy(plain)
    give_main_grads(adding)
    for seed in (0, 1):
        inputs = batch(config, seed=seed)
        losses(plain, config, inputs).backward()
        losses(adding, config, inputs).backward()
    left = {name for name, parameter in adding.named_parameters() if parameter.grad is not None}
    matrices = {name for name, parameter in adding.named_parameters() if parameter.dim() == 2}
    # Tables that are no factor of a product, and the convolution, are autograd's.
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in left & matrices} <= {
        "rel_embeddings", "position_embeddings", "token_type_embeddings",
    }  # fmt: skip
    for name, found in totals(adding).items():
        expected = plain.get_parameter(name).grad
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13, msg=name)


def test_stages_of_their_own_add_to_their_own_tables() -> None:
    """The first stage has the look-up, the last one the head: no table of either is left to autograd."""
    config = CONFIGS["v2"]
    plain = DebertaForMaskedLM(config).double()
    adding = copy.deepcopy(plain)
    give_main_grads(adding)
    inputs, count = batch(config), config.num_hidden_layers
    results = []
    for model in (plain, adding):
        hidden = None
        for layers in (range(1), range(1, count)):
            hidden = model.forward_stage(hidden, **inputs, layers=layers, dropout_key=3)
        hidden[0, 0].backward()
        results.append(model)
    name = "deberta.embeddings.word_embeddings.weight"
    assert adding.get_parameter(name).grad is None
    torch.testing.assert_close(totals(adding)[name], plain.get_parameter(name).grad, rtol=1e-10, atol=1e-13)


def test_gradients_that_nobody_asks_for_are_not_added() -> None:
    """SiFT's inner passes differentiate to a perturbation alone."""
    config = CONFIGS["v2"]
    model = DebertaForMaskedLM(config).double()
    give_main_grads(model)
    noise = torch.zeros(2, 11, config.hidden_size, dtype=torch.float64, requires_grad=True)
    norm = model.deberta.embeddings.LayerNorm
    hook = norm.register_forward_pre_hook(lambda _, inputs: inputs[0] + noise)
    loss = losses(model, config, batch(config))
    (gradient,) = torch.autograd.grad(loss, noise, retain_graph=False)
    hook.remove()
    assert gradient.abs().max() > 0
    assert all(p.grad is None for p in model.parameters())
    assert len(main_grads(model)) == len(list(model.parameters())) and not any(t.any() for t in main_grads(model).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_are_float32_whatever_the_weights_are(dtype: torch.dtype) -> None:
    """A thousandth added to one, a thousand times: 16-bit sums would stay at one."""
    layers = [Linear(4, 3).to(dtype) for _ in range(2)]
    join_(layers)
    for layer in layers:
        give_main_grads(layer, torch.float32)
        main_grad(layer).fill_(1.0)
    x = torch.full((1, 4), 2.0**-10, dtype=dtype)
    for _ in range(1000):
        sum(y.sum() for y in joint_linear(x, layers)).backward()
    for layer in layers:
        assert layer.weight.grad is None and main_grad(layer).dtype == torch.float32
        torch.testing.assert_close(main_grad(layer), torch.full((3, 4), 1 + 1000 / 1024))
        assert layer.bias.grad.dtype == torch.float32


def test_adjacent_sums_take_one_product() -> None:
    layers = [Linear(4, 3).double() for _ in range(3)]
    join_(layers)
    whole = torch.zeros(9, 4, dtype=torch.float64)
    for layer, part in zip(layers, whole.split(3), strict=True):
        set_main_grads(layer, {"weight": part})
    products = []
    addmm = torch.addmm
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "addmm", lambda *a, **k: products.append(a[0].shape) or addmm(*a, **k))
        sum((n + 1) * y.sum() for n, y in enumerate(joint_linear(x, layers))).backward()
    assert products == [(9, 4)]
    expected = x.flatten(0, 1).sum(0)
    assert all(torch.allclose(part, (n + 1) * expected) for n, part in enumerate(whole.split(3)))


def test_there_is_no_second_derivative() -> None:
    layer = Linear(4, 3)
    give_main_grads(layer)
    x = torch.randn(2, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(linear(x, layer).square().sum(), x, create_graph=True)
