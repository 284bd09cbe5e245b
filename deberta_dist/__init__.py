"""Pre-training and fine-tuning of DeBERTa across tensor, pipeline and ZeRO-3 data parallelism.

The names below are found on first use, so that tools which only read configurations or text start without torch.
"""

import importlib
from typing import Any

_HOMES = {
    "DebertaConfig": "deberta_dist.models.config",
    "DebertaForMaskedLM": "deberta_dist.models.masked_lm",
    "DebertaForReplacedTokenDetection": "deberta_dist.models.classification",
    "DebertaForSequenceClassification": "deberta_dist.models.classification",
    "DebertaModel": "deberta_dist.models.encoder",
    "load_masked_lm": "deberta_dist.conversion.load",
    "preset": "deberta_dist.models.presets",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
