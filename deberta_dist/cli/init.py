"""Writes a new pre-training run: a launcher, its TOML and its DeepSpeed JSON, which need nothing but the installed package.

deberta-dist init my_run --preset v3-base
deberta-dist init my_run --preset v2-xxlarge --name big
"""

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from deberta_dist.errors import ConfigError, with_exit_code
from deberta_dist.files.atomic import new_file
from deberta_dist.files.shipped import shipped

TOML = "launchers/pretrain_1.5b.toml"
JSON = "ds_configs/zero3_bf16.json"
JSON_NAME = "deepspeed.json"
# The launcher's Python half names the TOML by the stem, DeepSpeed passes the path on unquoted, and a dot would end the stem.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")

LAUNCHER = """#!/bin/sh
''':'
# Pre-trains what {name}.toml says. One file, two readers: a shell runs this half; DeepSpeed gives the file to
# Python on every GPU, for which this half is one string.
#   deepspeed --hostfile H {name}.sh [--section.key value ...]
#   sh {name}.sh [--hostfile H ...] [--section.key value ...] [--dry-run]
command -v deberta-dist >/dev/null 2>&1 || {{
    echo "{name}.sh: no 'deberta-dist' on PATH; activate the environment that has the package" >&2
    exit 2
}}
exec deberta-dist pretrain "$0" "$@"
: <<'...'
'''
from deberta_dist.training.pretrain import main

main(__file__)
...
"""


class Recipe(NamedTuple):
    """What differs between the published sizes: the peak learning rate, and a micro-batch to begin with."""

    learning_rate: str
    source: str
    micro_batch_size: int


# Peak learning rates of Table 8: 2e-4 for base and large, 1.5e-4 for 1.5B. Its base ablation, with batches of 256, has 1e-4.
_PAPER = "DeBERTa paper (arXiv 2006.03654), Table 8"
_ASSUMED = "as for the nearest size of the DeBERTa paper; none is published for masked language modelling"
# By preset; the DeBERTaV3 paper trains by replaced-token detection, whose learning rates are higher and do not carry over.
RECIPES = {
    "v1-base": Recipe("2e-4", f"{_PAPER}, base", 32),
    "v1-large": Recipe("2e-4", f"{_PAPER}, large", 16),
    "v1-xlarge": Recipe("1.5e-4", _ASSUMED, 16),
    "v2-xlarge": Recipe("1.5e-4", _ASSUMED, 32),
    "v2-xxlarge": Recipe("1.5e-4", f"{_PAPER}, 1.5B", 32),
    "v3-xsmall": Recipe("2e-4", _ASSUMED, 32),
    "v3-small": Recipe("2e-4", _ASSUMED, 32),
    "v3-base": Recipe("2e-4", _ASSUMED, 32),
    "v3-large": Recipe("2e-4", _ASSUMED, 16),
}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Write a new pre-training run: a launcher, its TOML and its DeepSpeed JSON.",
        epilog="Edit the TOML: it names the corpus (prepare-corpus makes one) and the tokenizer. Sizes for your GPUs: plan.",
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="directory to make; an existing one has to be empty")
    parser.add_argument("--preset", required=True, help=f"model: {', '.join(RECIPES)}")
    parser.add_argument(
        "--name", metavar="STEM", help="file name of launcher and TOML, without extension (default: pretrain_PRESET)"
    )
    return parser.parse_args()


def preset_of(name: str) -> str:
    """A preset with a recipe, by any of its published names.

    Raises:
        ConfigError: there is none.
    """
    from deberta_dist.models.presets import preset_name

    found = preset_name(name)
    if found not in RECIPES:
        raise ConfigError(f"--preset {name}: that one is for tests and has no recipe; choose from {', '.join(RECIPES)}")
    return found


def run_toml(preset: str, *, name: str) -> str:
    """The shipped TOML with this run's own values in place of those of the 1.5 billion model."""
    recipe = RECIPES[preset]
    head = (
        f"# DeBERTa {preset}, trained by masked language modelling with the recipe of the DeBERTa paper (arXiv 2006.03654).\n"
        f"# Sizes to begin with; for your GPUs: deberta-dist plan {name}.toml --gpus 64 --gpu h100\n"
        f"# Every key is explained in deberta_dist/config/schema.py. Relative paths start from this folder.\n"
    )
    text = shipped(TOML).read_text(encoding="utf-8")
    text = head + text[text.index("\n[model]") :]
    values = {
        "preset": (f'"{preset}"', ""),
        "train": ('"data/corpus/train"', "deberta-dist prepare-corpus writes both"),
        "validation": ('"data/corpus/heldout"', ""),
        "tokenizer": ('"data/spm.model"', "the released one, or deberta-dist train-tokenizer"),
        "micro_batch_size": (str(recipe.micro_batch_size), "sequences; deberta-dist plan finds what your GPUs hold"),
        "num_micro_batches": ('"auto"', "what the global batch leaves"),
        "learning_rate": (recipe.learning_rate, f"peak; {recipe.source}"),
        "tensor_parallel_size": ("1", "more, inside a node, where memory is short"),
        "data_parallel_size": ('"auto"', "what the number of processes leaves"),
        "directory": (f'"runs/{name}"', ""),
        "deepspeed": (f'"{JSON_NAME}"', ""),
    }
    for key, (value, comment) in values.items():
        line = f"{key} = {value}"
        line = f"{line:<33} # {comment}" if comment else line
        text, count = re.subn(rf"^{key} = .*$", line.replace("\\", r"\\"), text, flags=re.MULTILINE)
        assert count == 1, f"{TOML}: {key} stands there {count} times"
    return re.sub(r"^every_steps = 1_000 .*$", "every_steps = 1_000", text, flags=re.MULTILINE)


def refuse_directory(directory: Path) -> None:
    """Refuses a directory whose files the run's would be mixed with.

    Raises:
        ConfigError: it is no directory, or not an empty one.
    """
    if os.path.lexists(directory) and not directory.is_dir():
        raise ConfigError(f"{directory} exists and is not a directory: name another one")
    if directory.is_dir() and (inside := sorted(os.listdir(directory))):
        raise ConfigError(f"{directory} is not empty (it holds {', '.join(inside[:3])}): name a new directory")


def write_files(directory: Path, files: Sequence[tuple[str, bytes]]) -> None:
    """Writes the files of a run; a launcher can be executed."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files:
        with new_file(directory / name) as file:
            file.write(content)
        if name.endswith(".sh"):
            (directory / name).chmod(0o755)


@with_exit_code
def main() -> int:
    """Runs the verb; the exit code is 0, or that of the error printed."""
    arguments = parse_arguments()
    preset = preset_of(arguments.preset)
    name = f"pretrain_{preset.replace('-', '_')}" if arguments.name is None else arguments.name
    if not _NAME.fullmatch(name):
        raise ConfigError(f"--name {name!r}: expected 1 to 64 letters, digits, - and _, the first a letter or digit")
    refuse_directory(arguments.directory)
    files = [
        (f"{name}.sh", LAUNCHER.format(name=name).encode()),
        (f"{name}.toml", run_toml(preset, name=name).encode()),
        (JSON_NAME, shipped(JSON).read_bytes()),
    ]
    write_files(arguments.directory, files)
    for written, _ in files:
        print(f"written: {arguments.directory / written}")
    print(f"next: deberta-dist pretrain {arguments.directory / name}.toml --dry-run")
    return 0
