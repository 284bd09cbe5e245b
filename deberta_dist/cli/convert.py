"""Converts a checkpoint between a run's own form, the published names, Microsoft's and Hugging Face's.

tools/convert_checkpoint.py runs/demo hf/ --to huggingface --tokenizer spm.model
tools/convert_checkpoint.py deberta-v2-xxlarge/ start/ --to deberta_dist
tools/convert_checkpoint.py runs/demo program/ --to onnx
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from deberta_dist.errors import ConfigError, with_exit_code
from deberta_dist.files.atomic import replace_file
from deberta_dist.values import CONVERSION_FORMATS


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    from deberta_dist.conversion.options import add_options

    parser = argparse.ArgumentParser(description="Convert a checkpoint from one format into another.")
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="run directory, checkpoint directory or weights file; the format is detected",
    )
    parser.add_argument("target", type=Path, metavar="TARGET", help="directory to make")
    parser.add_argument("--to", required=True, choices=CONVERSION_FORMATS, help="format")
    add_options(
        parser, dtype_help="number format (default: the source's; if it has several, one that holds them all)", decodes=True
    )
    parser.add_argument("--fused", action="store_true", help="v1: one fused in_proj per layer, as in the first releases")
    parser.add_argument("--report", type=Path, help="also write the key report here")
    parser.add_argument("--tokenizer", type=Path, help="SentencePiece model (default: the one beside the source)")
    parser.add_argument(
        "--with-code",
        action="store_true",
        help="huggingface: also write the code with which transformers runs DeBERTa's mask decoder (needs trust_remote_code)",
    )
    parser.add_argument(
        "--license",
        metavar="ID",
        help="huggingface: licence for the model card, by the hub's name (mit, apache-2.0, ...) or 'other:NAME[,LINK]'",
    )
    parser.add_argument(
        "--language",
        action="append",
        default=[],
        metavar="CODE",
        help="huggingface: language for the model card (en, de, ...); repeatable",
    )
    parser.add_argument("--force", action="store_true", help="replace a converted checkpoint at TARGET, and the report")
    return parser.parse_args()


def check_report(report: Path, *, apart: Sequence[Path], force: bool) -> None:
    """Refuses a report path where something would be lost.

    Raises:
        ConfigError: its folder is missing, or is SOURCE or TARGET; or something is there and may not be replaced.
    """
    folder = report.resolve().parent
    if not folder.is_dir():
        raise ConfigError(f"--report {report}: its directory does not exist")
    if any(path.resolve() in (folder, *folder.parents) for path in apart):
        raise ConfigError(f"--report {report} lies in SOURCE or TARGET, which has a report of its own: name another place")
    if os.path.lexists(report) and (not force or not report.is_file()):
        raise ConfigError(f"--report {report} exists already and is not overwritten: name another file, or give --force")


@with_exit_code
def main() -> int:
    """Runs the tool; the exit code is 0, or that of the error printed."""
    arguments = parse_arguments()
    from deberta_dist.conversion.convert import convert
    from deberta_dist.conversion.report import summary

    if arguments.report is not None:
        check_report(arguments.report, apart=(arguments.source, arguments.target), force=arguments.force)
    report = convert(
        arguments.source,
        arguments.target,
        to=arguments.to,
        dtype=arguments.dtype,
        is_fused=arguments.fused,
        allow_unmapped=arguments.allow_unmapped,
        prefix=arguments.prefix,
        decoder=arguments.decoder,
        tokenizer_path=arguments.tokenizer,
        force=arguments.force,
        with_code=arguments.with_code,
        license_name=arguments.license,
        languages=arguments.language,
    )
    if arguments.report is not None:
        replace_file(arguments.report, (json.dumps(report, indent=1) + "\n").encode())
    print(summary(report))
    num_bytes = sum(file["bytes"] for file in report["files"].values())
    print(f"{arguments.target}: {len(report['files'])} files, {num_bytes:,} bytes")
    return 0
