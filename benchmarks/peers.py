"""Other implementations, made with our configuration: Hugging Face's, the published one from a checkout, and Triton's.

disentangled-flash (Triton kernels, Apache 2.0) is measured and is no implementation of `kernels`: what it offers is a
module that makes the projections itself, for queries that are the keys (no enhanced mask decoder) and masks of padding
(no documents), with dropout from torch's random state, which recomputation and other layouts could not draw again.
"""

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from deberta_dist.conversion import huggingface, official
from deberta_dist.errors import ConfigError
from deberta_dist.models.config import DebertaConfig

HUGGING_FACE, PUBLISHED, DISENTANGLED_FLASH = "Hugging Face", "published", "disentangled-flash"
# What differs from transformers' own numbers, which are ModernBERT-base's. "tiny" is for rehearsals.
MODERN_BERT: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "base": {},
        "large": {"hidden_size": 1024, "intermediate_size": 2624, "num_hidden_layers": 28, "num_attention_heads": 16},
        "tiny": {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0),
        },
    }
)
# Imported at the top of the published package and used by nothing that is measured.
_STUBS = {
    "ujson": (),
    "six": (),
    "regex": (),
    "requests": (),
    "sklearn": (),
    "sklearn.metrics": ("matthews_corrcoef", "f1_score", "accuracy_score"),
}


def hugging_face_config(config: DebertaConfig) -> Any:
    """Their configuration of our model."""
    from transformers import DebertaV2Config

    fields = huggingface.to_config(
        config,
        kind=huggingface.V2,
        architecture="DebertaV2ForMaskedLM",
        dtype="float32",
        labels={},
        num_labels=None,
        decoder=None,
        is_legacy=False,
    )
    return DebertaV2Config(**{k: v for k, v in fields.items() if k != "model_type"}, attn_implementation="eager")


def hugging_face_attention(config: DebertaConfig) -> nn.Module:
    """Their self-attention; parameters as published."""
    from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention

    return DisentangledSelfAttention(hugging_face_config(config))


def hugging_face_layer(config: DebertaConfig) -> Callable[[], nn.Module]:
    """Makes one whole layer of theirs."""
    from transformers.models.deberta_v2.modeling_deberta_v2 import DebertaV2Layer

    return lambda: DebertaV2Layer(hugging_face_config(config))


def hugging_face_masked_lm(config: DebertaConfig, state: dict[str, Tensor] | None = None) -> nn.Module:
    """Their masked language model; it has no enhanced mask decoder, nor its table of positions.

    Args:
        config: Our configuration, translated into theirs.
        state: Our weights by published name; None for their own random ones.
    """
    from transformers import DebertaV2ForMaskedLM

    model = DebertaV2ForMaskedLM(hugging_face_config(config))
    if state is None:
        return model
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not {name for name in missing if "decoder" not in name}, missing
    assert all("position_embeddings" in name for name in unexpected), unexpected
    return model


def modern_bert_masked_lm(size: str, *, is_global: bool) -> nn.Module:
    """ModernBERT's masked language model with torch's attention; logits of the targets alone, as it was trained.

    Args:
        size: A key of `MODERN_BERT`.
        is_global: Every token sees all others in every layer; else in every third, and 128 tokens around it in the rest.
    """
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    every = {"global_attn_every_n_layers": 1} if is_global else {}
    config = ModernBertConfig(**MODERN_BERT[size], **every, sparse_prediction=True, attn_implementation="sdpa")
    return ModernBertForMaskedLM(config)


def import_ahead() -> None:
    """Loads transformers' models where they are installed: that takes seconds, and a GPU need not wait for it."""
    if has_transformers():
        importlib.import_module("transformers.models.deberta_v2.modeling_deberta_v2")
        importlib.import_module("transformers.models.modernbert.modeling_modernbert")


def has_transformers() -> bool:
    """Whether the package can be imported."""
    return importlib.util.find_spec("transformers") is not None


def has_disentangled_flash() -> bool:
    """Whether the package, and transformers, which it takes its settings from, can be imported."""
    return importlib.util.find_spec("disentangled_flash") is not None and has_transformers()


def disentangled_flash_attention(config: DebertaConfig, device: torch.device) -> nn.Module:
    """Its self-attention for training: the Triton kernels on a GPU, else what it falls back to, in plain torch."""
    fields = hugging_face_config(config)
    if device.type == "cuda":
        from disentangled_flash import TritonTrainingDisentangledSelfAttention

        return TritonTrainingDisentangledSelfAttention(fields)
    from disentangled_flash._torch import TorchTrainingDisentangledSelfAttention

    return TorchTrainingDisentangledSelfAttention(fields)


def published_module(checkout: Path, name: str) -> types.ModuleType:
    """A module of a checkout of microsoft/DeBERTa, which imports on current versions only with some names put in place.

    Args:
        checkout: the folder with its package ``DeBERTa``.
        name: dotted name of the module within that package.

    Raises:
        ConfigError: the folder has no such package, or it cannot be imported.
    """
    if not (checkout / "DeBERTa" / "deberta" / "disentangled_attention.py").is_file():
        raise ConfigError(
            f"--official {checkout} holds no DeBERTa/deberta/disentangled_attention.py; expected a checkout of "
            "github.com/microsoft/DeBERTa"
        )
    import collections
    import collections.abc

    import numpy

    for module, names in ((numpy, {"int": int, "float": float}), (collections, {"Sequence": collections.abc.Sequence})):
        for missing in names.keys() - vars(module).keys():
            setattr(module, missing, names[missing])
    _stub("torch._six", string_classes=(str, bytes))
    for stub, attributes in _STUBS.items():
        try:
            importlib.import_module(stub)
        except ImportError:
            _stub(stub, **dict.fromkeys(attributes))
    if str(checkout) not in sys.path:
        sys.path.append(str(checkout))
    try:
        return importlib.import_module(f"DeBERTa.{name}")
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"--official {checkout}: DeBERTa.{name} cannot be imported: {error}") from error


def published_attention(checkout: Path, config: DebertaConfig) -> nn.Module:
    """Its self-attention."""
    return published_module(checkout, "deberta").DisentangledSelfAttention(_published_config(checkout, config))


def published_layer(checkout: Path, config: DebertaConfig) -> Callable[[], nn.Module]:
    """Makes one whole layer of its."""
    module = published_module(checkout, "deberta.bert")
    return lambda: module.BertLayer(_published_config(checkout, config))


def published_masked_lm(checkout: Path, config: DebertaConfig, state: dict[str, Tensor]) -> nn.Module:
    """Its masked language model with our weights."""
    module = published_module(checkout, "apps.models.masked_language_model")
    model = module.MaskedLanguageModel(_published_config(checkout, config))
    model.load_state_dict(state, strict=True)
    return model


def _published_config(checkout: Path, config: DebertaConfig) -> Any:
    fields = official.to_config(config)
    return published_module(checkout, "deberta.config").ModelConfig.from_dict(fields)


def _stub(name: str, **attributes: Any) -> None:
    module = types.ModuleType(name)
    module.__dict__.update(attributes)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    sys.modules[name] = module
