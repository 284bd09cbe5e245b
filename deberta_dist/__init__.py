"""Pre-training and fine-tuning of DeBERTa across tensor, pipeline and ZeRO-3 data parallelism.

The names below are found on first use, so that tools which only read configurations or text start without torch.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "DebertaConfig": "deberta_dist.models.config",
    "DebertaForMaskedLM": "deberta_dist.models.masked_lm",
    "DebertaForMultipleChoice": "deberta_dist.models.heads",
    "DebertaForQuestionAnswering": "deberta_dist.models.heads",
    "DebertaForReplacedTokenDetection": "deberta_dist.models.classification",
    "DebertaForSequenceClassification": "deberta_dist.models.classification",
    "DebertaForTokenClassification": "deberta_dist.models.heads",
    "DebertaModel": "deberta_dist.models.encoder",
    "load_masked_lm": "deberta_dist.conversion.load",
    "load_with_head": "deberta_dist.conversion.load",
    "preset": "deberta_dist.models.presets",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
