"""The tensor-parallel plan: which parameter is cut along which dimension, as one table of strings.

Training swaps layers by it, the weight store decides by it who owns and who borrows, checkpoints and
conversion cut and join by it. Nothing else in the package knows how DeBERTa is split.

=========== ======================================================================= ===================
kind        meaning (tp ranks)                                                      cut dimension
=========== ======================================================================= ===================
column      Linear whose output features are split; weight rows and bias are local  0
row         Linear whose input features are split; weight columns local, bias whole weight 1
vocab       embedding rows (or a bias over the vocabulary) are split, padded        0
replicate   whole on every rank, gradients equal on every rank                      none
partial     whole on every rank, each rank's gradient is a part of the sum          none
=========== ======================================================================= ===================

``partial`` is the relative table and its LayerNorm: the table is projected by each rank's own heads, so
each rank sees only its heads' share of the gradient. It is completed once per step when ranks hand over
their gradients, not once per layer and micro-batch. Under sequence parallelism (``sequence.py``) replicated weights
of ``in_sequence_region`` are ``partial`` too: each rank sees its own tokens alone.
"""

import re
from dataclasses import dataclass

COLUMN, ROW, VOCAB, REPLICATE, PARTIAL = "column", "row", "vocab", "replicate", "partial"

Rules = tuple[tuple[str, str], ...]

_LAYER = r"deberta\.encoder\.layer\.\d+\."

# Module name pattern -> kind. Parameters of modules that match nothing are replicated. A network may have rules of its own.
SHARDING_RULES: Rules = (
    (_LAYER + r"attention\.self\.(query|key|value|pos_key|pos_query)_proj", COLUMN),
    (_LAYER + r"attention\.output\.dense", ROW),
    (_LAYER + r"intermediate\.dense", COLUMN),
    (_LAYER + r"output\.dense", ROW),
    (r"deberta\.embeddings\.word_embeddings", VOCAB),
    (r"lm_predictions\.lm_head", VOCAB),
    (r"deberta\.encoder\.rel_embeddings", PARTIAL),
    (r"deberta\.encoder\.LayerNorm", PARTIAL),
)

# Identity modules where a replicated activation enters split computation: its gradient is summed there.
ENTER_PATTERN = r".*\.enter"
# The one dropout whose activation is split by heads: its mask must differ between ranks.
SPLIT_DROPOUT_PATTERN = _LAYER + r"attention\.self\.dropout"
# Sequence parallelism: dropouts of activations that are split along the sequence, and identity modules where tokens are
# chosen, where neighbouring tokens are looked at, and where all are needed.
SEQUENCE_DROPOUT_PATTERN = rf"deberta\.(embeddings|encoder\.conv)\.dropout|{_LAYER}(attention\.)?output\.dropout"
OWN_TOKENS_PATTERN = r".*\.own_tokens"
HALO_PATTERN = r"deberta\.encoder\.conv\.halo"
WHOLE_SEQUENCE_PATTERN = r"whole_sequence"


@dataclass(frozen=True)
class Sharding:
    """How one parameter is laid out over the tensor-parallel ranks.

    Attributes:
        kind: One of the kinds above.
        dim: Dimension that is cut, or None where every rank holds the whole.
    """

    kind: str
    dim: int | None


def module_kind(name: str, rules: Rules = SHARDING_RULES) -> str:
    """Kind of the module called ``name`` (published name)."""
    return next((kind for pattern, kind in rules if re.fullmatch(pattern, name)), REPLICATE)


def parameter_sharding(name: str, rules: Rules = SHARDING_RULES) -> Sharding:
    """How the parameter with published ``name`` is cut."""
    module, _, leaf = name.rpartition(".")
    kind = module_kind(module, rules)
    if kind in (COLUMN, VOCAB):
        return Sharding(kind, 0)
    if kind == ROW:
        return Sharding(ROW, 1) if leaf == "weight" else Sharding(REPLICATE, None)
    return Sharding(kind, None)


def in_sequence_region(name: str, *, decoder_layer: int | None) -> bool:
    """Whether the module or parameter ``name`` is used where sequence parallelism splits the tokens.

    That is embeddings, layers and convolution. Not the enhanced mask decoder and the head, whose rows are targets.

    Args:
        name: Published name.
        decoder_layer: Number of the layer that decodes, with the absolute positions; None where they are added to the
            embeddings.
    """
    if layer := re.match(r"deberta\.encoder\.layer\.(\d+)\.", name):
        return int(layer[1]) != decoder_layer
    if name.startswith("deberta.embeddings.position_embeddings"):
        return decoder_layer is None
    return name.startswith(("deberta.embeddings.", "deberta.encoder.conv."))


def padded_vocabulary(vocab_size: int, *, tensor_parallel_size: int) -> int:
    """Vocabulary rows after padding so that every rank holds equally many.

    Each shard is a multiple of 128 rows where the vocabulary is split, which keeps its matrix products on aligned rows
    and whole tiles. One rank needs no padding: its logits have aligned rows by themselves (`models.cross_entropy`).
    """
    if tensor_parallel_size == 1:
        return vocab_size
    multiple = 128 * tensor_parallel_size
    return -(-vocab_size // multiple) * multiple


def local_slice(full_size: int, *, rank: int, size: int) -> slice:
    """The part of a dimension of ``full_size`` that ``rank`` of ``size`` holds. Sizes are checked before."""
    assert full_size % size == 0
    part = full_size // size
    return slice(rank * part, (rank + 1) * part)
