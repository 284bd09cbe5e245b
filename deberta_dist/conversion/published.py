"""This package's own form: ``config.json`` and ``model.safetensors`` with the published names and nothing else.

Runs export it, and training starts from it. Its configuration has no ``model_type``, Hugging Face's has one.
"""

from collections.abc import Mapping
from typing import Any

from deberta_dist.conversion.rules import Format
from deberta_dist.models.config import DebertaConfig

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
FORMAT = Format(name="deberta_dist")


def to_config(config: DebertaConfig, *, head: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json``: the published fields, and what `meeting.Published.head_config` says of a head."""
    return {**config.to_dict(), **head}
