"""Locates the files that ship with the code: launchers, DeepSpeed JSONs, TOMLs, recipes.

They have one copy, at the top of a checkout. The build maps those in ``launchers/`` and ``ds_configs/`` that need nothing but
the package into the wheel (``setup.py``); code that needs one asks here and finds it in both.
"""

import os
from collections.abc import MutableMapping
from pathlib import Path

from deberta_dist.errors import ConfigError

PACKAGE = Path(__file__).resolve().parents[1]
SHIPPED = PACKAGE / "_shipped"
"""Made by the build; a checkout has none."""


def is_installed() -> bool:
    """Whether this is an installed package, not a checkout."""
    return SHIPPED.is_dir()


def shipped(name: str) -> Path:
    """Path of a shipped file.

    Args:
        name: As in a checkout, such as ``launchers/pretrain_1.5b.toml``.

    Raises:
        ConfigError: it is in no wheel (the demo and its rows, the tests' requirements), and this is not a checkout.
    """
    path = (SHIPPED if is_installed() else PACKAGE.parent) / name
    if not path.exists():
        raise ConfigError(
            f"{name} needs a checkout of the project: it is not part of the installed package ({path} does not exist)"
        )
    return path


def find_package(environment: MutableMapping[str, str]) -> None:
    """Makes sure that a process with this environment imports this package.

    An installed package is found by the interpreter itself. (Its folder in PYTHONPATH would put all packages beside it before
    the standard library.)
    """
    if not is_installed():
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PACKAGE.parent), environment.get("PYTHONPATH")]))
