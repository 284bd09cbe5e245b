"""A clear error where a model mixes number formats in an operation that does not support it.

A model with several formats can be right: under autocast, with adapters that convert, with normalisations in float32. So
nothing is refused beforehand, and nothing is checked unless an operation has failed.
"""

import re
from typing import Any

from torch import nn

_ABOUT_FORMATS = re.compile(r"dtype|scalar type|data type|same type", re.IGNORECASE)


class ExplainsNumberFormats(nn.Module):
    """A model that, when an operation fails over number formats, says which of its parameters have which."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls ``forward`` as nn.Module does.

        Raises:
            ValueError: parameters of several number formats meet in one operation.
        """
        try:
            return super().__call__(*args, **kwargs)
        except RuntimeError as error:
            formats = number_formats(self)
            if len(formats) < 2 or not _ABOUT_FORMATS.search(str(error)):
                raise
            found = "; ".join(f"{name}: {_shown(modules)}" for name, modules in formats.items())
            message = (
                f"the model's parameters have several number formats ({found}) and one operation cannot take both: bring them to "
                "one, as model.to(torch.float32) does, or call the model under torch.autocast"
            )
        raise ValueError(message)


def number_formats(model: nn.Module) -> dict[str, list[str]]:
    """Floating point formats of a model's parameters -> names of the modules with such parameters; the most common first."""
    found: dict[str, dict[str, None]] = {}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            modules = found.setdefault(str(parameter.dtype).removeprefix("torch."), {})
            modules[name.rpartition(".")[0]] = None
    return {name: list(modules) for name, modules in sorted(found.items(), key=lambda item: -len(item[1]))}


def _shown(modules: list[str]) -> str:
    return ", ".join(modules[:3]) + (f" and {len(modules) - 3} more" if len(modules) > 3 else "")
