"""A model in memory out of published weights: for targets that hold a program and not only numbers."""

from torch import nn

from deberta_dist.checkpoint.errors import CheckpointError
from deberta_dist.conversion.meeting import Published
from deberta_dist.conversion.weights import shorten
from deberta_dist.models.classification import DebertaForReplacedTokenDetection
from deberta_dist.models.encoder import DebertaModel
from deberta_dist.models.heads import LABELLED, model_with_head
from deberta_dist.models.initialisation import without_memory
from deberta_dist.models.masked_lm import DebertaForMaskedLM


def build_model(found: Published, *, where: object) -> tuple[nn.Module, list[str]]:
    """The model with its first head of: fine-tuning, replaced token detection, masked language modelling; else the backbone.

    A masked language modelling head beside a detector was trained on the generator's encoder, not on this one.

    Args:
        found: The checkpoint; all its weights have one number format.
        where: For messages.

    Returns:
        The model in evaluation mode, and the published names of the weights that it holds.

    Raises:
        CheckpointError: the checkpoint lacks some of them.
    """
    with without_memory():
        model = _empty(found)
    prefix = "deberta." if isinstance(model, DebertaModel) else ""
    names = {name: prefix + name for name, _ in model.named_parameters()}
    if not isinstance(model, DebertaForMaskedLM):
        # Absolute positions of a decoder that this model does not have.
        names = {name: key for name, key in names.items() if key in found.weights or key not in found.lacking}
    if missing := [key for key in names.values() if key not in found.weights]:
        raise CheckpointError(f"{where} is no whole {type(model).__name__}: it lacks {shorten(missing)}")
    state = {name: found.weights[key].read() for name, key in names.items()}
    model.load_state_dict(state, strict=len(names) == len(list(model.parameters())), assign=True)
    model.eval().requires_grad_(False)
    return model, list(names.values())


def _empty(found: Published) -> nn.Module:
    if found.head:
        return model_with_head(found.config, found.head, num_labels=found.num_labels if found.head in LABELLED else None)
    heads = {name.split(".")[0] for name in found.weights}
    if "mask_predictions" in heads:
        return DebertaForReplacedTokenDetection(found.config)
    if "lm_predictions" in heads:
        return DebertaForMaskedLM(found.config)
    return DebertaModel(found.config, seed=None)
