"""Defaults for fields that a configuration file lacks: those of the library that the file was written for.

The published code and Hugging Face's v1 and v2 classes read DeBERTa's files with different defaults. `DebertaConfig` has the
published code's; readers of Hugging Face's files fill in theirs with `filled_in` first.

Source: microsoft/DeBERTa DeBERTa/deberta/config.py and the ``getattr`` of bert.py, disentangled_attention.py and
pooling.py@4d7fe0bd; huggingface/transformers v5.23.0 configuration_deberta.py, configuration_deberta_v2.py and the
``getattr`` of their models.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from deberta_dist.errors import ConfigError

V1, V2 = "deberta", "deberta-v2"
REQUIRED, UNREAD = "(required)", "(not read)"

# field, as the library spells it: (published code, v1 classes, v2 classes). None: taken from other fields
# (attention_head_size, embedding_size, pooler_hidden_size, cls_dropout), or no terms at all (pos_att_type).
TABLE: Mapping[str, tuple[Any, Any, Any]] = MappingProxyType(
    {
        "vocab_size": (REQUIRED, 50265, 128100),
        "hidden_size": (768, 768, 1536),
        "num_hidden_layers": (12, 12, 24),
        "num_attention_heads": (12, 12, 24),
        "attention_head_size": (None, UNREAD, None),
        "intermediate_size": (3072, 3072, 6144),
        "hidden_act": ("gelu", "gelu", "gelu"),
        "hidden_dropout_prob": (0.1, 0.1, 0.1),
        "attention_probs_dropout_prob": (0.1, 0.1, 0.1),
        "max_position_embeddings": (512, 512, 512),
        "type_vocab_size": (0, 0, 0),
        "initializer_range": (0.02, 0.02, 0.02),
        "layer_norm_eps": (1e-7, 1e-7, 1e-7),
        "padding_idx": (0, UNREAD, UNREAD),
        "pad_token_id": (UNREAD, 0, 0),
        "embedding_size": (None, None, None),
        "position_biased_input": (True, True, True),
        "relative_attention": (False, False, False),
        "max_relative_positions": (-1, -1, -1),
        "position_buckets": (-1, UNREAD, -1),
        "pos_att_type": ("c2p", None, None),
        "share_att_key": (False, UNREAD, False),
        "norm_rel_ebd": ("none", UNREAD, "none"),
        "conv_kernel_size": (0, UNREAD, 0),
        "conv_groups": (1, UNREAD, 1),
        "conv_act": ("tanh", UNREAD, "tanh"),
        "pooler_hidden_size": (None, None, None),
        "pooler_hidden_act": ("gelu", "gelu", "gelu"),
        "pooler_dropout": (0.0, 0.0, 0.0),
        "cls_drop_out": (None, UNREAD, UNREAD),
        "cls_dropout": (UNREAD, None, None),
        "talking_head": (UNREAD, False, UNREAD),
        # Chooses a loss; the published code has one, which this package carries along in its form, too.
        "problem_type": (None, None, None),
        # This package's own; the classes compute "plain" whatever it says.
        "decoder": (None, UNREAD, UNREAD),
        "masked_lm_decoder": (UNREAD, None, None),
    }
)

IGNORED: Mapping[str, str] = MappingProxyType(
    {
        "architectures": "names the head, which its keys show",
        "id2label": "names of classes, carried along; without them the rows of the head say how many",
        "label2id": "likewise",
        "num_labels": "likewise",
        "legacy": "which names the masked language modelling head has: its keys show",
        "tie_word_embeddings": "the head of every class is tied; a matrix of its own is refused",
        "bos_token_id": "of the tokenizer",
        "eos_token_id": "of the tokenizer",
        "chunk_size_feed_forward": "these classes do not cut the feed-forward",
        "is_encoder_decoder": "there is no decoder of text",
        "output_attentions": "what a call returns",
        "output_hidden_states": "what a call returns",
        "return_dict": "what a call returns",
        "dtype": "the weights have one",
        "transformers_version": "who wrote the file",
        "model_type": "which pair of classes",
        "_name_or_path": "where it was loaded from",
    }
)


def filled_in(raw: Mapping[str, Any], *, kind: str) -> tuple[dict[str, Any], list[str]]:
    """A configuration as Hugging Face's classes understand it, and the names of its fields that they ignore.

    Args:
        raw: The parsed config.json.
        kind: Which classes read it, `V1` or `V2`.

    Returns:
        Fields for `DebertaConfig.from_dict`, and names of ignored fields.

    Raises:
        ConfigError: ``kind`` is not a DeBERTa, or the model has talking heads, which are not implemented.
    """
    if kind not in (V1, V2):
        raise ConfigError(f"config.json has model_type {str(kind)[:50]!r}: only deberta and deberta-v2 are DeBERTa")
    if raw.get("talking_head") and kind == V1:
        raise ConfigError("config.json has talking_head = true: attention that mixes heads is not built here")
    defaults = column(kind)
    unread = [key for key in raw if key == "talking_head" or defaults.get(key) == UNREAD]
    # Fields whose default depends on other fields are left out, as are null ones, which mean the same to these classes.
    found = {key: value for key, value in defaults.items() if value is not None and value != UNREAD}
    found |= {key: value for key, value in raw.items() if value is not None and key not in unread}
    found.pop("talking_head", None)
    found.setdefault("pos_att_type", [])
    # Widths equal to their defaults are left out, so that equal models have equal configurations.
    width, heads = found["hidden_size"], found["num_attention_heads"]
    if type(width) is type(heads) is int and found.get("attention_head_size", 0) * heads == width:
        found.pop("attention_head_size", None)
    if found.get("embedding_size") == width:
        found.pop("embedding_size")
    return found, unread


def column(kind: str) -> dict[str, Any]:
    """Field -> default of one pair of Hugging Face's classes; `UNREAD` where they do not look at it."""
    return {name: defaults[1 if kind == V1 else 2] for name, defaults in TABLE.items()}
