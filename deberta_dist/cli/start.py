"""Turns ``deberta-dist pretrain`` and ``deberta-dist finetune`` into a call of DeepSpeed's launcher; see ``training/launch.py``."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from deberta_dist.errors import ConfigError, require_packages
from deberta_dist.files.shipped import find_package
from deberta_dist.training.launch import command, split_arguments

MODULE = "deberta_dist.cli.rank"


def run_toml(verb: str, run: str) -> Path:
    """The TOML of a run that is named by its TOML or by its launcher.

    Raises:
        ConfigError: there is none.
    """
    toml = Path(run).with_suffix(".toml")
    if Path(run).suffix not in (".toml", ".sh") or not toml.is_file():
        raise ConfigError(
            f"{verb} {run}: expected the TOML of a run, or its launcher with the TOML beside it; {toml} does not exist "
            "(deberta-dist init DIR --preset v3-base writes one)"
        )
    return toml


def start(verb: str, toml: Path, arguments: Sequence[str]) -> NoReturn:
    """Replaces this process by DeepSpeed's launcher, or for a dry run by the script alone.

    Args:
        verb: ``pretrain`` or ``finetune``.
        toml: Configuration of the run; relative paths in it start from its folder.
        arguments: DeepSpeed's flags and the run's own, mixed.

    Raises:
        ConfigError: a package is missing, DeepSpeed's flags name no machines or wrong ones, or the TOML is wrong.
    """
    require_packages("torch", "deepspeed")
    environment = dict(os.environ)
    find_package(environment)
    # The launcher of this interpreter, also where its environment is not activated.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    words = command(toml, split_arguments(arguments), environment, start=(MODULE, verb))
    sys.stdout.flush()
    os.execvpe(words[0], words, environment)
