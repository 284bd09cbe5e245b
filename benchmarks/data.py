"""The data path beside the published one and beside what a run needs: preparation, memory, masking.

Unless --tokenizer and --tokens are given, both are made from the bundled text. Every part runs by itself or, without
--part, after the others.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import data_masking, data_memory, data_preparation
from benchmarks.data_inputs import DataInputs, bundled_text, make_tokens
from deberta_dist.errors import ConfigError
from deberta_dist.operations.measure import machine

# By name: a module with add_arguments(parser) and run(arguments, inputs), which prints and returns its figures.
PARTS = {"memory": data_memory, "preparation": data_preparation, "masking": data_masking}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this verb."""
    parser.add_argument("--part", choices=(*PARTS, "all"), default="all", help="what is measured (default: all)")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="an spm.model; with --tokens")
    parser.add_argument("--tokens", type=Path, metavar="PATH", help="a token file made with it, or a directory of them")
    parser.add_argument("--vocab-size", type=int, default=16_000, help="pieces of one made here (default: 16000)")
    parser.add_argument("--directory", type=Path, help="where to work (default: the system's temporary directory)")
    for name, module in PARTS.items():
        module.add_arguments(parser.add_argument_group(name))


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the parts asked for and returns their figures as JSON.

    Raises:
        ConfigError: only one of --tokenizer and --tokens is given.
        BenchmarkError: a contestant failed, or contestants that must agree do not.
    """
    if (arguments.tokenizer is None) != (arguments.tokens is None):
        raise ConfigError("--tokenizer and --tokens belong together: give both, or neither to have them made")
    with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="benchmark-data-") as folder:
        tokenizer, tokens = arguments.tokenizer, arguments.tokens
        if tokenizer is None:
            tokenizer, tokens = make_tokens(Path(folder), vocab_size=arguments.vocab_size)
        inputs = DataInputs(text=bundled_text(), tokenizer=tokenizer, tokens=tokens, directory=Path(folder))
        names = PARTS if arguments.part == "all" else (arguments.part,)
        return {"machine": machine(), "parts": {name: PARTS[name].run(arguments, inputs) for name in names}}
