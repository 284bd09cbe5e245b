"""AdamW over the flat parameters: NVIDIA apex's fused one, or torch's. The one door to apex.

The package called ``apex`` on PyPI is an unrelated web toolkit. NVIDIA's is built from its repository; it counts as installed
only if its CUDA extension can be imported.
"""

import importlib
from collections.abc import Callable, Sequence

import torch
from torch import nn

from deberta_dist import config as run_config
from deberta_dist.errors import ConfigError


def apex_fused_adam() -> Callable[..., torch.optim.Optimizer] | None:
    """NVIDIA apex's FusedAdam if it can run here, otherwise None."""
    if not torch.cuda.is_available():
        return None
    try:
        importlib.import_module("amp_C")  # the compiled extension: a Python-only build would import, and fail in the first step
        return importlib.import_module("apex.optimizers").FusedAdam
    except Exception:  # the unrelated apex may raise anything on import
        return None


def make_optimizer(
    flats: Sequence[nn.Parameter], *, settings: run_config.Optimizer, decayed: Sequence[bool] = (True, False)
) -> torch.optim.Optimizer:
    """AdamW with decoupled weight decay.

    Args:
        flats: Flat parameters of a weight store, each of which gets a parameter group of its own.
        settings: ``[optimizer]`` of the configuration.
        decayed: Whether weight decay applies to each of them; see `Network.flat_groups`.

    Raises:
        ConfigError: ``optimizer.name`` is "apex_fused_adam" and apex is not installed.
    """
    # A parameter group each, which DeepSpeed turns into a sub-group each: the weight store finds its shards by them.
    groups = [
        {"params": [flat], "weight_decay": settings.weight_decay if decays else 0.0}
        for flat, decays in zip(flats, decayed, strict=True)
    ]
    lr, betas, eps = settings.learning_rate, settings.betas, settings.eps
    fused_adam = apex_fused_adam() if settings.name in ("auto", "apex_fused_adam") else None
    if fused_adam is not None:
        return fused_adam(groups, adam_w_mode=True, lr=lr, betas=betas, eps=eps)
    if settings.name == "apex_fused_adam":
        raise ConfigError(
            'optimizer.name = "apex_fused_adam": NVIDIA apex with its CUDA extension is not installed here '
            '(build it from NVIDIA\'s repository; the PyPI package "apex" is another thing), or write "auto"'
        )
    return torch.optim.AdamW(groups, fused=True, lr=lr, betas=betas, eps=eps)
