"""The sharding rules: which parameter is cut along which dimension, as one table of strings.

Training replaces layers by it, ties take owners and borrowers from it, checkpoints and conversion cut and join tensors by it.
Nothing else in the package knows how DeBERTa is divided over tensor ranks.

=========== ======================================================================= ===================
kind        meaning (tp ranks)                                                      cut dimension
=========== ======================================================================= ===================
column      Linear cut by output features; weight rows and bias are local           0
row         Linear cut by input features; weight columns local, bias whole          weight 1
vocab       embedding rows, or a bias over the vocabulary, cut after padding        0
replicate   whole on every rank, gradients equal on every rank                      none
partial     whole on every rank, each rank's gradient is a summand                  none
=========== ======================================================================= ===================

``partial`` are the relative table and its LayerNorm: each rank projects the table for its own heads, and so sees only its
heads' share of the gradient. The summands are added once per step, when ties reduce gradients, not once per layer and
micro-batch. Under sequence parallelism (``sequence.py``) the replicated weights of ``in_sequence_region`` are ``partial``
too: each rank sees its own tokens alone.
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

# Identity modules where a replicated activation enters a tensor-parallel region: its gradient is summed there.
ENTER_PATTERN = r".*\.enter"
# The one dropout whose activation is divided by heads: its mask must differ between ranks. All other dropouts work on
# replicated activations, where masks must be equal.
SPLIT_DROPOUT_PATTERN = _LAYER + r"attention\.self\.dropout"
# Sequence parallelism: dropouts of activations that are divided along the sequence, and identity modules where a rank takes
# its own tokens, where it needs its neighbours' tokens, and where it needs all.
SEQUENCE_DROPOUT_PATTERN = rf"deberta\.(embeddings|encoder\.conv)\.dropout|{_LAYER}(attention\.)?output\.dropout"
OWN_TOKENS_PATTERN = r".*\.own_tokens"
HALO_PATTERN = r"deberta\.encoder\.conv\.halo"
WHOLE_SEQUENCE_PATTERN = r"whole_sequence"


@dataclass(frozen=True)
class Sharding:
    """How one parameter is laid out over the tensor-parallel ranks.

    Attributes:
        kind: COLUMN, ROW, VOCAB, REPLICATE or PARTIAL.
        dim: Dimension of the tensor that is cut; None where every rank holds the whole.
    """

    kind: str
    dim: int | None


def module_kind(name: str, rules: Rules = SHARDING_RULES) -> str:
    """Kind of the module with published ``name``."""
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
    """Whether a module or parameter works on the tokens that sequence parallelism divides.

    Embeddings, layers and convolution do. The enhanced mask decoder and the head do not: their rows are targets.

    Args:
        name: Published name of the module or parameter.
        decoder_layer: Number of the enhanced mask decoder's layer, which adds absolute positions; None where they are added
            to the embeddings.
    """
    if layer := re.match(r"deberta\.encoder\.layer\.(\d+)\.", name):
        return int(layer[1]) != decoder_layer
    if name.startswith("deberta.embeddings.position_embeddings"):
        return decoder_layer is None
    return name.startswith(("deberta.embeddings.", "deberta.encoder.conv."))


def padded_vocabulary(vocab_size: int, *, tensor_parallel_size: int) -> int:
    """Vocabulary rows after padding, so that every tensor rank holds the same number.

    Each rank's rows are a multiple of 128, which keeps matrix products on aligned rows and whole tiles. A single rank needs no
    padding: `models.cross_entropy` aligns the rows of its logits itself.
    """
    if tensor_parallel_size == 1:
        return vocab_size
    multiple = 128 * tensor_parallel_size
    return -(-vocab_size // multiple) * multiple


def local_slice(full_size: int, *, rank: int, size: int) -> slice:
    """The indices of a dimension of ``full_size`` that ``rank`` of ``size`` holds."""
    assert full_size % size == 0, "check_tensor_parallel_sizes and padded_vocabulary come first"
    local_size = full_size // size
    return slice(rank * local_size, (rank + 1) * local_size)
