"""Programs that `torch.export` makes: any batch and length, padded or not, compute what the model computes."""

import dataclasses
import importlib
import pkgutil

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import deberta_dist.models
from deberta_dist.models.classification import DebertaForReplacedTokenDetection, DebertaForSequenceClassification
from deberta_dist.models.encoder import DebertaModel
from deberta_dist.models.masked_lm import DebertaForMaskedLM
from deberta_dist.models.presets import preset

SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 90}
CONFIGS = {
    "v1": preset("tiny-v1", **SMALL),
    "v1_biased": preset(
        "tiny-v1", **SMALL | {"num_hidden_layers": 1}, position_biased_input=True, type_vocab_size=2, embedding_size=24
    ),
    "v2": preset("tiny-v2", **SMALL, type_vocab_size=2),
    "v3": preset("tiny-v2", **SMALL, conv_kernel_size=0),
}
MODELS = (DebertaModel, DebertaForSequenceClassification, DebertaForReplacedTokenDetection, DebertaForMaskedLM)
QUICK = {("v2", DebertaForMaskedLM), ("v1_biased", DebertaForSequenceClassification)}
# The longest is farther than the tables of distances reach.
SIZES = ((3, 17), (2, 40), (1, 64), (5, 3), (1, 1))


def inputs(config, batch: int, length: int) -> dict[str, Tensor]:
    """One sample of full length, and padded ones."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(1, config.vocab_size, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, length // (row + 1) + 1 :] = 0
    found = {"input_ids": ids, "attention_mask": mask}
    if config.type_vocab_size:
        found["token_type_ids"] = torch.randint(config.type_vocab_size, ids.shape, generator=generator)
    return found


def numbers(output: object) -> Tensor:
    """Logits, or hidden states."""
    return getattr(output, "logits" if hasattr(output, "logits") else "last_hidden_state")


def exported(model: nn.Module, example: dict[str, Tensor], **options: object) -> nn.Module:
    """The program, with the dimensions that callers may choose left open, without bounds."""
    # Which of its neighbours a token sees is asked for at distance 1, of more than one that has such a neighbour.
    shortest = 3 if any(x.dim() == 3 for x in example.values()) else None
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", min=shortest)}
    shapes = {name: {number: dims[min(number, 1)] for number in range(x.dim())} for name, x in example.items()}
    return torch.export.export(model, (), example, dynamic_shapes=shapes, **options).module()


def compare(model: nn.Module, program: nn.Module, config, keys: tuple[str, ...]) -> None:
    """At all of ``SIZES``."""
    for batch, length in SIZES:
        given = {name: x for name, x in inputs(config, batch, length).items() if name in keys}
        with torch.no_grad():
            ours, theirs = numbers(model(**given)), numbers(program(**given))
        assert ours.shape == theirs.shape and (ours - theirs).abs().max() < 2e-5, (batch, length)


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        pytest.param(name, cls, marks=() if (name, cls) in QUICK else pytest.mark.slow, id=f"{name}-{cls.__name__}")
        for name in CONFIGS
        for cls in MODELS
    ],
)
def test_any_batch_and_length(name: str, cls: type[nn.Module], randomise) -> None:
    config = CONFIGS[name]
    model = randomise(cls(config)).eval()
    example = inputs(config, 3, 17)
    if cls is DebertaForReplacedTokenDetection:
        example.pop("token_type_ids", None)
    program = exported(model, example)
    compare(model, program, config, tuple(example))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"strict": True}, {"mask": False}, {"mask": "pairs"}], ids=str)
def test_other_ways_to_export(options: dict, randomise) -> None:
    config = CONFIGS["v2"]
    model = randomise(DebertaModel(config)).eval()
    example = inputs(config, 3, 17)
    mask = options.pop("mask", True)
    if mask is False:
        del example["attention_mask"]
    if mask == "pairs":
        example["attention_mask"] = example["attention_mask"][:, None, :] * torch.ones(17, 1, dtype=torch.int64).tril()
        program = exported(model, example, **options)
        example = {name: x.repeat(1, *[2] * (x.dim() - 1))[:, :23] for name, x in example.items()}
        example["attention_mask"] = example["attention_mask"][:, :, :23]
        with torch.no_grad():
            assert (numbers(program(**example)) - numbers(model(**example))).abs().max() < 2e-5
        return
    compare(model, exported(model, example, **options), config, tuple(example))


def test_token_logits_are_those_of_every_real_token(randomise) -> None:
    for name in ("v1", "v1_biased", "v2"):
        config = CONFIGS[name]
        model = randomise(DebertaForMaskedLM(config)).eval()
        given = inputs(config, 3, 40)
        with torch.no_grad():
            every, real = model.token_logits(**given), model(**given).logits
        assert every.shape == (3, 40, config.vocab_size)
        assert (every[given["attention_mask"].bool()] - real).abs().max() < 2e-5


def test_what_is_refused() -> None:
    model = DebertaForMaskedLM(CONFIGS["v2"])
    example = inputs(CONFIGS["v2"], 2, 8)
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        exported(model, example)
    with pytest.raises(ValueError, match="exported without labels"):
        exported(model.eval(), {**example, "labels": example["input_ids"]})
    # Nothing of the attempts is left in what later calls find.
    with torch.no_grad():
        assert model(**example).logits.isfinite().all()


def test_every_output_can_be_returned_by_a_program() -> None:
    found = set()
    for module in pkgutil.iter_modules(deberta_dist.models.__path__, "deberta_dist.models."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if name.endswith("Output") and dataclasses.is_dataclass(value):
                found.add(value)
    assert len(found) >= 3
    for cls in found:
        given = {field.name: torch.ones(1) for field in dataclasses.fields(cls)}
        leaves, spec = pytree.tree_flatten(cls(**given))
        assert len(leaves) == len(given) and isinstance(pytree.tree_unflatten(leaves, spec), cls), cls
