"""The shape of a DeBERTa: every field of the published configurations, declared and checked.

The published code reads a third of these through ``getattr`` with a default, so that a misspelt or forgotten field silently
builds another model. Here all are declared, absent ones get the published code's defaults, and unknown ones are refused.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from deberta_dist.errors import ConfigError

DECODERS = ("emd", "plain")
ACTIVATION_NAMES = ("gelu", "relu", "silu", "swish", "tanh", "sigmoid", "linear")
POSITION_TERMS = ("c2p", "p2c")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
# Far beyond any DeBERTa: a larger number is a slip that would end in an overflow, or in a plan that takes for ever.
LARGEST = {
    "vocab_size": 2**24,
    "hidden_size": 2**16,
    "num_hidden_layers": 512,
    "num_attention_heads": 2**10,
    "attention_head_size": 2**12,
    "intermediate_size": 2**20,
    "max_position_embeddings": 2**18,
    "type_vocab_size": 2**16,
    "embedding_size": 2**16,
    "max_relative_positions": 2**18,
    "position_buckets": 2**18,
    "conv_kernel_size": 255,
    "layer_norm_eps": 1.0,
    "initializer_range": 100.0,
}


BOOKKEEPING_KEYS = frozenset(
    """
    _attn_implementation_autoset _commit_hash _name_or_path add_cross_attention architectures auto_map bad_words_ids
    begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id
    diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing
    id2label is_decoder is_encoder_decoder label2id legacy length_penalty mask_token_id max_length min_length
    model_type no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences output_attentions
    output_hidden_states output_scores prefix pruned_heads remove_invalid_values repetition_penalty
    return_dict return_dict_in_generate sentence_transformers sep_token_id suppress_tokens task_specific_params temperature
    tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torch_dtype torchscript
    transformers_version typical_p use_bfloat16 use_cache
    """.split()
)
"""Keys of published configuration files that change nothing in a model: accepted by ``DebertaConfig.from_dict`` and left behind.

Hugging Face writes what any of its models could have, generation of text included, and what it was loaded with.

Source: huggingface/transformers configuration_utils.py, 4.0 to 5.23.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DebertaConfig:
    """Sizes and switches of one DeBERTa of any generation (v1, v2, v3).

    A default is what the published code assumes when the field is absent from its JSON, which is seldom
    what a release uses: start from `presets.preset` or a published file.

    Raises:
        ConfigError: a size is not positive or beyond ``LARGEST``, heads do not divide the hidden size while
            ``attention_head_size`` is absent, a position term is not c2p or p2c, an activation or
            ``norm_rel_ebd`` or ``problem_type`` is unknown, the convolution has an even kernel or groups that do not divide the
            hidden size, a probability lies outside [0, 1), ``relative_attention`` is not true, or ``decoder`` is
            unknown or "emd" while positions are added at the input.
    """

    vocab_size: int
    """Rows of the word embedding table, padding of the vocabulary included."""
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    attention_head_size: int | None = None
    """Width of one head; absent means hidden_size / num_attention_heads."""
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    """Rows of the absolute position table, tokens."""
    type_vocab_size: int = 0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-7
    padding_idx: int = 0
    embedding_size: int | None = None
    """Width of the embedding tables; absent means hidden_size."""
    position_biased_input: bool = True
    """Absolute positions are added at the input; false means that the enhanced mask decoder adds them, if anything."""
    decoder: str | None = None
    """How masked language modelling decodes: "emd", the enhanced mask decoder, or "plain", the head on the last hidden
    states as in Hugging Face's classes. Absent means what the published code does: "emd" where ``position_biased_input``
    is false, else "plain". A value that says the same is stored as absent."""

    relative_attention: bool = False
    """Must be true; without it the model is a BERT."""
    max_relative_positions: int = -1
    """Largest distance with a row of its own, tokens; below 1 means max_position_embeddings."""
    position_buckets: int = -1
    """Logarithmic buckets per direction; below 1 means one row per distance (v1)."""
    pos_att_type: tuple[str, ...] = ("c2p",)
    """Position terms beside content-to-content; also accepted as "c2p|p2c"."""
    share_att_key: bool = False
    """Project the relative table with the content's own query and key projections (v2, v3)."""
    norm_rel_ebd: str = "none"
    """"layer_norm" normalises the relative table once per forward (v2, v3)."""

    conv_kernel_size: int = 0
    """Taps of the n-gram convolution beside layer 0 (v2); 0 means none."""
    conv_groups: int = 1
    conv_act: str = "tanh"

    pooler_hidden_size: int | None = None
    """Width of the pooler's input; absent means hidden_size, and nothing else fits."""
    pooler_hidden_act: str = "gelu"
    pooler_dropout: float = 0.0
    cls_drop_out: float | None = None
    """Dropout before the classifier; absent means hidden_dropout_prob."""
    problem_type: str | None = None
    """What a classifier's labels are, one of `PROBLEM_TYPES`; absent means what their number and shape say."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "pos_att_type", _position_terms(self.pos_att_type))
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "conv_groups",
        ):
            _require(getattr(self, name) >= 1, f"{name} = {getattr(self, name)} must be at least 1")
        for name, most in LARGEST.items():
            value = getattr(self, name)
            _require(value is None or value <= most, f"{name} = {value} must be at most {most}")
        for name in ("attention_head_size", "embedding_size", "pooler_hidden_size"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name} = {value} must be at least 1, or absent")
        _require(
            self.attention_head_size is not None or self.hidden_size % self.num_attention_heads == 0,
            f"num_attention_heads = {self.num_attention_heads} does not divide hidden_size = "
            f"{self.hidden_size}; change either, or give attention_head_size",
        )
        _require(
            self.pooler_hidden_size in (None, self.hidden_size),
            f"pooler_hidden_size = {self.pooler_hidden_size} must equal hidden_size = {self.hidden_size}",
        )
        _require(self.relative_attention is True, "relative_attention must be true: nothing else is built")
        _require(
            self.position_buckets < 1 or 2 <= self.position_buckets < 2 * (self.max_relative_distance - 1),
            f"position_buckets = {self.position_buckets} must be -1 (none), or at least 2 and less than twice the "
            f"largest distance, {self.max_relative_distance - 1}",
        )
        self._require_known_words()
        if self.decoder == ("plain" if self.position_biased_input else "emd"):
            object.__setattr__(self, "decoder", None)
        _require(
            self.conv_kernel_size < 1 or self.conv_kernel_size % 2 == 1,
            f"conv_kernel_size = {self.conv_kernel_size} is even and would change the sequence length",
        )
        _require(
            self.hidden_size % self.conv_groups == 0,
            f"conv_groups = {self.conv_groups} does not divide hidden_size = {self.hidden_size}",
        )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "pooler_dropout", "cls_drop_out"):
            value = getattr(self, name)
            _require(value is None or 0.0 <= value < 1.0, f"{name} = {value} must lie in [0, 1)")
        for name in ("layer_norm_eps", "initializer_range"):
            _require(getattr(self, name) > 0.0, f"{name} = {getattr(self, name)} must be above 0")
        _require(
            0 <= self.padding_idx < self.vocab_size,
            f"padding_idx = {self.padding_idx} is not a row of a vocabulary of {self.vocab_size}",
        )

    def _require_known_words(self) -> None:
        _require(self.decoder in (None, *DECODERS), f"decoder = {self.decoder!r} is neither 'emd' nor 'plain'")
        _require(
            not (self.decoder == "emd" and self.position_biased_input),
            "decoder = 'emd' adds absolute positions after the encoder, and position_biased_input = true at the input: "
            "set position_biased_input = false, or leave decoder out",
        )
        for name in ("hidden_act", "conv_act", "pooler_hidden_act"):
            value = getattr(self, name)
            _require(value in ACTIVATION_NAMES, f"{name} = {value!r} is not one of {', '.join(ACTIVATION_NAMES)}")
        _require(
            self.problem_type in (None, *PROBLEM_TYPES),
            f"problem_type = {self.problem_type!r} is not one of {', '.join(PROBLEM_TYPES)}",
        )
        _require(
            self.norm_rel_ebd in ("none", "layer_norm"),
            f"norm_rel_ebd = {self.norm_rel_ebd!r} is neither 'none' nor 'layer_norm'",
        )

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.attention_head_size or self.hidden_size // self.num_attention_heads

    @property
    def all_head_size(self) -> int:
        """Width of all heads together; need not be the hidden size."""
        return self.num_attention_heads * self.head_size

    @property
    def embedding_width(self) -> int:
        """Width of the embedding tables."""
        return self.embedding_size or self.hidden_size

    @property
    def max_relative_distance(self) -> int:
        """Distance, in tokens, from which on all distances are one."""
        return self.max_relative_positions if self.max_relative_positions >= 1 else self.max_position_embeddings

    @property
    def num_position_rows(self) -> int:
        """Rows of the relative table."""
        return 2 * (self.position_buckets if self.position_buckets >= 1 else self.max_relative_distance)

    @property
    def uses_enhanced_mask_decoder(self) -> bool:
        """Whether masked language modelling decodes with absolute positions added after the encoder."""
        return not self.position_biased_input and self.decoder != "plain"

    @property
    def has_absolute_positions(self) -> bool:
        """Whether anything adds absolute positions: the embeddings, or the enhanced mask decoder."""
        return self.position_biased_input or self.uses_enhanced_mask_decoder

    def require_masked_lm(self) -> None:
        """Refuses what the enhanced mask decoder cannot decode; masked language models call it.

        Raises:
            ConfigError: the decoder is used with one layer (it reads the input of the last of at least two),
                or with embeddings of another width than the hidden states to which positions are added.
        """
        if not self.uses_enhanced_mask_decoder:
            return
        _require(
            self.num_hidden_layers >= 2,
            f"num_hidden_layers = {self.num_hidden_layers} is too few: with position_biased_input false the "
            "enhanced mask decoder reads the input of the last of at least 2 layers (decoder = 'plain' does not)",
        )
        _require(
            self.embedding_width == self.hidden_size,
            f"embedding_size = {self.embedding_size} differs from hidden_size = {self.hidden_size}: with "
            "position_biased_input false the enhanced mask decoder adds position rows to hidden states (decoder = "
            "'plain' does not)",
        )

    @classmethod
    def from_dict(cls, published: Mapping[str, Any]) -> "DebertaConfig":
        """Reads a published configuration (the JSON of either release, as a mapping).

        Args:
            published: field name -> value; the nested ``pooling`` table and ``pad_token_id`` are understood.

        Raises:
            ConfigError: an unknown key (named, with the nearest known one), a missing vocab_size, a value of
                the wrong type, or what the constructor refuses.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for key, value in published.items():
            if key == "pooling":
                _require(isinstance(value, Mapping), f"pooling = {value!r} is no table")
                values.update({f"pooler_{name}": setting for name, setting in value.items()})
            elif key in known:
                values[key] = value
            elif key in SYNONYMS:
                values.setdefault(SYNONYMS[key], value)
            elif key not in BOOKKEEPING_KEYS:
                nearest = difflib.get_close_matches(str(key), [*known, *BOOKKEEPING_KEYS], n=1, cutoff=0.0)[0]
                raise ConfigError(f"model configuration: unknown key {key!r}; the nearest known key is {nearest!r}")
        if "vocab_size" not in values:
            raise ConfigError("model configuration: vocab_size is missing")
        for key, value in values.items():
            if key not in known:
                raise ConfigError(f"model configuration: unknown key 'pooling.{key.removeprefix('pooler_')}'")
            values[key] = _of_declared_type(key, value, known[key].type)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The published form: `from_dict` of it, after JSON, gives an equal configuration."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        values["pos_att_type"] = "|".join(self.pos_att_type)
        return values


SYNONYMS = {"pad_token_id": "padding_idx", "cls_dropout": "cls_drop_out", "masked_lm_decoder": "decoder"}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(f"model configuration: {message}")


def _position_terms(published: Any) -> tuple[str, ...]:
    """Reads "c2p|p2c" or a sequence of terms."""
    listed = published.split("|") if isinstance(published, str) else (published or ())
    is_list = isinstance(listed, (list, tuple)) and all(isinstance(term, str) for term in listed)
    _require(is_list, f"pos_att_type = {published!r} is neither text nor a list of texts")
    terms = tuple(term.strip().lower() for term in listed)
    if "p2p" in terms:
        raise ConfigError(
            "model configuration: pos_att_type has 'p2p', which the published code names but cannot run "
            "(it reads variables never set); no release has it"
        )
    _require(
        bool(terms) and set(terms) <= set(POSITION_TERMS) and len(set(terms)) == len(terms),
        f"pos_att_type = {published!r} must name c2p, p2c or both, once each"
        + ("" if terms else "; absent from a file of Hugging Face's classes it means neither, which is not built here"),
    )
    return terms


def _of_declared_type(key: str, value: Any, declared: Any) -> Any:
    """Lets JSON's 1 stand for 1.0 and nothing else: "512" or 1 for true would pass silently otherwise."""
    if key == "pos_att_type" or (value is None and declared not in (int, float, bool, str)):
        return value
    wanted = next(kind for kind in (bool, int, float, str) if declared in (kind, kind | None))
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        raise ConfigError(f"model configuration: {key} = {value!r} must be of type {wanted.__name__}")
    return value
