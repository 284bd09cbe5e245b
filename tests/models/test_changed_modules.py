"""Modules that somebody has replaced, hooked, parametrised, pruned or quantised are called, in the place of any of ours."""

import copy
import functools
import re
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from deberta_dist.errors import ConfigError
from deberta_dist.models.classification import DebertaForSequenceClassification
from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.fused_qkv import Linear, joint_linear
from deberta_dist.models.masked_lm import DebertaForMaskedLM
from deberta_dist.models.plain import is_plain, require_unchanged
from deberta_dist.models.presets import preset
from deberta_dist.parallel.tensor.apply import apply_sharding_rules

LEAVES = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.Conv1d)
SIZES = {"num_hidden_layers": 2, "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 16}
CONFIGS = {
    "v1": preset("tiny-v1", **SIZES),
    "v2": preset("tiny-v2", **SIZES, position_buckets=8),
    "v3": preset("tiny-v2", **SIZES, position_buckets=8, conv_kernel_size=0),
    "biased": preset("tiny-v1", **SIZES, position_biased_input=True, embedding_size=16, type_vocab_size=2),
}
MODELS = {"masked": DebertaForMaskedLM, "classifier": DebertaForSequenceClassification}
CASES = [(config, model) for config in CONFIGS for model in MODELS]


def model_of(config: str, kind: str) -> nn.Module:
    model = MODELS[kind](CONFIGS[config], seed=5).double().eval()
    with torch.no_grad():  # biases start as zeros
        for number, parameter in enumerate(model.parameters()):
            parameter += 0.02 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(number), dtype=parameter.dtype
            )
    return model


def logits_of(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 61, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    if not isinstance(model, DebertaForMaskedLM):
        return model(ids, mask).logits
    documents = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 3, 3], [1, 1, 1, 1, 1, 2, 2, 0, 0]])
    return model(ids, mask, torch.where(torch.arange(9) % 3 == 1, ids, 0), document_ids=documents).logits


def leaves(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LEAVES)}


def uses(name: str, config: DebertaConfig, kind: str) -> int:
    """How often one pass uses a module: the decoder runs the last layer twice for queries, once for keys and values."""
    decodes = kind == "masked" and not config.position_biased_input
    if name.endswith("position_embeddings"):
        return int(config.position_biased_input or decodes)
    passes = 2 if decodes and f"layer.{config.num_hidden_layers - 1}." in name else 1
    if name.endswith(("key_proj", "query_proj")) and "pos_" not in name:
        return (passes if "query" in name else 1) + config.share_att_key
    return 1 if name.endswith(("value_proj", "pos_key_proj", "pos_query_proj")) else passes


def give_subclass(module: nn.Module, note: Callable[[], None]) -> None:
    kind = type(module)

    def forward(self: nn.Module, *args: Tensor) -> Tensor:
        note()
        return kind.forward(self, *args)

    module.__class__ = type("OfTheirOwn", (kind,), {"forward": forward})


def give_forward(module: nn.Module, note: Callable[[], None]) -> None:
    before = module.forward
    module.forward = lambda *args: (note(), before(*args))[1]


CHANGES: dict[str, Callable[[nn.Module, Callable[[], None]], object]] = {
    "subclass": give_subclass,
    "forward attribute": give_forward,
    "forward hook": lambda module, note: module.register_forward_hook(lambda *_: note()),
    "pre-hook": lambda module, note: module.register_forward_pre_hook(lambda *_: note()),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("config", "kind"), CASES)
def test_each_changed_module_is_called_once_per_use(config: str, kind: str, change: str) -> None:
    model = model_of(config, kind)
    expected = logits_of(model)
    calls: Counter[str] = Counter()
    for name, module in leaves(model).items():
        CHANGES[change](module, functools.partial(calls.update, [name]))
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-9, atol=1e-11)
    wanted = {name: uses(name, CONFIGS[config], kind) for name in leaves(model)}
    if kind == "masked" and change in ("subclass", "forward attribute"):
        wanted["deberta.embeddings.word_embeddings"] += 1  # the decoder's matrix
    assert {name: calls[name] for name in wanted} == wanted
    logits_of(model).sum().backward()  # nothing is in the way of gradients


@pytest.mark.parametrize(("config", "kind"), CASES)
def test_what_a_hook_makes_of_an_output_counts(config: str, kind: str) -> None:
    """Half more of an output is half more of weight and bias, whichever module it is."""
    model = model_of(config, kind)
    expected = logits_of(model)
    for name, module in leaves(model).items():
        hook = module.register_forward_hook(lambda _, inputs, output: 1.5 * output)
        found = logits_of(model)
        hook.remove()
        scaled = list(module.parameters(recurse=False))
        before = [parameter.detach().clone() for parameter in scaled]
        for parameter in scaled:
            parameter.data *= 1.5
        if name.endswith("word_embeddings") and kind == "masked":
            # Of what is looked up alone; the decoder has the matrix as it is.
            norm = model.lm_predictions.lm_head.LayerNorm
            for parameter in norm.parameters():
                scaled.append(parameter)
                before.append(parameter.detach().clone())
                parameter.data /= 1.5
        wanted = logits_of(model)
        for parameter, values in zip(scaled, before, strict=True):
            parameter.data.copy_(values)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")
        # A LayerNorm follows embeddings and sees no factor.
        if uses(name, CONFIGS[config], kind) and not name.endswith("embeddings"):
            assert not torch.allclose(found, expected, rtol=1e-7, atol=1e-9), name


@pytest.mark.parametrize("config", ["v1", "v2"])
def test_what_a_hook_makes_of_an_input_counts(config: str) -> None:
    model = model_of(config, "masked")
    for name, module in leaves(model).items():
        if not isinstance(module, nn.Linear):
            continue
        hook = module.register_forward_pre_hook(lambda _, inputs: 1.5 * inputs[0])
        found = logits_of(model)
        hook.remove()
        before = module.weight.detach().clone()
        module.weight.data *= 1.5
        wanted = logits_of(model)
        module.weight.data.copy_(before)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("config", ["v1", "v2"])
def test_backward_hooks_fire(config: str) -> None:
    model = model_of(config, "masked")
    seen: Counter[str] = Counter()
    for name, module in leaves(model).items():
        if isinstance(module, nn.Linear):
            module.register_full_backward_hook(lambda *_, name=name: seen.update([name]))
    logits_of(model).sum().backward()
    assert seen == {
        name: uses(name, CONFIGS[config], "masked") for name, m in leaves(model).items() if isinstance(m, nn.Linear)
    }


def test_global_hooks_fire() -> None:
    model = model_of("v2", "classifier")
    called: set[nn.Module] = set()
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: called.add(module) or None)
    try:
        logits_of(model)
    finally:
        hook.remove()
    unused = {"deberta.embeddings.position_embeddings"}
    assert {name for name, module in leaves(model).items() if module not in called} == unused


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize(("config", "kind"), CASES)
def test_parametrised_weights_are_the_weights(config: str, kind: str) -> None:
    model = model_of(config, kind)
    expected = logits_of(model)
    for _name, module in leaves(model).items():
        with torch.no_grad():
            module.weight /= 2
        parametrize.register_parametrization(module, "weight", Doubled())
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-9, atol=1e-11)
    model.double()  # lays weights side by side where it may
    logits_of(model).sum().backward()
    assert all(m.parametrizations.weight.original.grad is not None for n, m in leaves(model).items() if "query_proj" in n)


def test_weight_norm_and_pruning_train() -> None:
    """Both make the weight anew before each call: a weight that is read past the module stands still."""
    for change in (nn.utils.weight_norm, lambda module: prune.random_unstructured(module, "weight", amount=0.5)):
        torch.manual_seed(0)
        model = model_of("v2", "masked")
        changed = [
            m
            for n, m in leaves(model).items()
            if n.endswith(("query_proj", "key_proj", "intermediate.dense", "word_embeddings"))
        ]
        for module in changed:
            change(module)
        before = logits_of(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        before.square().mean().backward()
        optimizer.step()
        after = logits_of(model)
        for module in changed:  # what it is now, for good
            nn.utils.remove_weight_norm(module) if hasattr(module, "weight_g") else prune.remove(module, "weight")
        assert all(is_plain(module) for module in changed)
        torch.testing.assert_close(after, logits_of(model), rtol=1e-9, atol=1e-11)
        assert not torch.allclose(before, after)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("config", "kind"), CASES)
def test_dynamic_quantisation_of_all_linear_layers(config: str, kind: str) -> None:
    model = model_of(config, kind).float()
    expected = logits_of(model).detach()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    names = [name for name, module in quantised.named_modules() if type(module) is torch.ao.nn.quantized.dynamic.Linear]
    assert names == [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    with torch.no_grad():
        found = logits_of(quantised)
    error = (found - expected).norm() / expected.norm()
    assert 0 < error < 0.05, error
    quantised.to("cpu")  # nothing reads weights that are none any more


def test_layers_of_a_model_are_of_torchs_own_classes() -> None:
    """Libraries that quantise or adapt modules know them by their exact type."""
    for config, kind in CASES:
        assert {type(module) for module in leaves(model_of(config, kind)).values()} <= set(LEAVES)


def test_a_layer_without_bias_may_stand_anywhere() -> None:
    model = model_of("v2", "masked")
    expected = logits_of(model)
    for name, module in list(leaves(model).items()):
        if isinstance(module, nn.Linear) and re.search("key_proj|output.dense|intermediate", name):
            other = nn.Linear(module.in_features, module.out_features, bias=False, dtype=torch.float64)
            with torch.no_grad():
                module.bias.zero_()
                other.weight.copy_(module.weight)
            zeroed = copy.deepcopy(model)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, other)
            torch.testing.assert_close(logits_of(model), logits_of(zeroed), rtol=1e-9, atol=1e-11)
    assert not torch.allclose(logits_of(model), expected)


def test_weights_of_another_kind_are_left_to_their_module() -> None:
    class Packed(Tensor):
        """Such as libraries of quantisation make; their operations know it, views of memory do not."""

    layers = [Linear(4, 3).double() for _ in range(2)]
    x = torch.randn(2, 4, dtype=torch.float64)
    expected = joint_linear(x, layers)
    assert all(map(is_plain, layers))
    for layer in layers:
        layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Packed))
    assert not any(map(is_plain, layers))
    for found, wanted in zip(joint_linear(x, layers), expected, strict=True):
        torch.testing.assert_close(found.as_subclass(Tensor), wanted)


@pytest.mark.parametrize("name", ["query_proj", "output.dense", "intermediate.dense", "word_embeddings"])
@pytest.mark.parametrize("change", CHANGES)
def test_the_trainer_refuses_changed_modules(name: str, change: str) -> None:
    model = model_of("v2", "masked")
    require_unchanged(model)
    changed = next(full for full in leaves(model) if full.endswith(name))
    CHANGES[change](model.get_submodule(changed), lambda: None)
    with pytest.raises(ConfigError, match=re.escape(changed)):
        require_unchanged(model)
    with pytest.raises(ConfigError, match=re.escape(changed)):
        apply_sharding_rules(model, vocab_size=61, rank=0, size=2, group=None)
