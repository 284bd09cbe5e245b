"""Loads weights under any of the names that they were published with.

Every model registers it as a hook, so that ``load_state_dict(published, strict=True)`` works.
"""

from typing import Any

import torch
from torch import Tensor, nn

V1_LEAVES = {
    "q_bias": "query_proj.bias",
    "v_bias": "value_proj.bias",
    "pos_proj.weight": "pos_key_proj.weight",
    "pos_q_proj.weight": "pos_query_proj.weight",
    "pos_q_proj.bias": "pos_query_proj.bias",
}
"""Names in the fused form of v1 -> those of the later code, beside ``in_proj.weight`` itself."""


def accept_published_weights(model: nn.Module, *, head_size: int, backbone: str = "deberta.") -> None:
    """Makes ``model.load_state_dict`` accept the published spellings when called on ``model`` itself.

    Args:
        model: a model with or without the backbone as a submodule; it gets a pre-hook.
        head_size: width of one attention head; the fused projections are interleaved by head.
        backbone: prefix of the backbone's names in this model; empty if the model is the backbone.
    """

    def before_load(module: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        # With a prefix this is a submodule, and the outer model's hook has run. ``state`` is torch's copy: changing it is safe.
        if prefix:
            return
        renamed = {_present_name(name, backbone): value for name, value in state.items()}
        state.clear()
        state.update(separate_projections(renamed, head_size=head_size))

    model.register_load_state_dict_pre_hook(before_load)


def separate_projections(state: dict[str, Tensor], *, head_size: int) -> dict[str, Tensor]:
    """Cuts the fused projections of early v1 checkpoints into the separate ones of the later code.

    ``in_proj`` [3 N H, D] holds query, key and value rows of head 0, then of head 1, and so on. The fused form has no
    bias for keys and position keys: they are zero. (The published hook takes whatever the fresh module held, which
    for keys changes the position-to-content scores.)

    Args:
        state: published names to tensors, fused or not; left as it is.
        head_size: width of one head; ``in_proj`` has 3 x head_size rows for each.

    Source: microsoft/DeBERTa DeBERTa/deberta/disentangled_attention.py@4d7fe0bd, ``_pre_load_hook``.
    """
    separate: dict[str, Tensor] = {}
    for name, value in state.items():
        stem, _, leaf = name.rpartition("attention.self.")
        stem += "attention.self."
        if leaf == "in_proj.weight":
            query, key, value = value.unflatten(0, (-1, 3, head_size)).unbind(1)
            separate[stem + "query_proj.weight"] = query.flatten(0, 1)
            separate[stem + "key_proj.weight"] = key.flatten(0, 1)
            separate[stem + "value_proj.weight"] = value.flatten(0, 1)
            separate[stem + "key_proj.bias"] = torch.zeros_like(separate[stem + "key_proj.weight"][:, 0])
        elif leaf in V1_LEAVES:
            separate[stem + V1_LEAVES[leaf]] = value
            if leaf == "pos_proj.weight":
                separate[stem + "pos_key_proj.bias"] = torch.zeros_like(value[:, 0])
        else:
            separate[name] = value
    return {name: value for name, value in separate.items() if not name.endswith(".position_ids")}


def _present_name(name: str, backbone: str) -> str:
    for published in ("bert.", "deberta."):
        if name.startswith(published):
            return backbone + name.removeprefix(published)
    return name
