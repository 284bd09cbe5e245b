"""Command-line arguments about reading text, shared by every tool that reads it."""

import argparse

from deberta_dist.preparation.reading.documents import BAD_RECORDS, DOCUMENTS, INVALID_UTF8, TextReadOptions
from deberta_dist.preparation.reading.inputs import FORMATS

_DEFAULTS = TextReadOptions()


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds ``--input`` and what ``read_options`` needs."""
    group = parser.add_argument_group("reading")
    group.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="[NAME=]PATH",
        help=".txt, .jsonl, .ndjson, .json (one object a line; all also .gz, .zst, .bz2, .xz) and .parquet files, directories "
        "of them, or quoted patterns (** too); unpacking a file takes as much memory as its compression window, at most "
        "2 GiB per process",
    )
    group.add_argument(
        "--format",
        choices=FORMATS,
        default=_DEFAULTS.format,
        help="format of the files, where their names do not show it (wiki_00); files without an extension are then read, too "
        "(default: auto, by extension)",
    )
    group.add_argument(
        "--text-field",
        default=_DEFAULTS.text_field,
        metavar="FIELD",
        help="field of JSON objects or column of .parquet files; doc.text: the field text in doc "
        f"(default: {_DEFAULTS.text_field})",
    )
    group.add_argument(
        "--document",
        choices=DOCUMENTS,
        default=_DEFAULTS.document,
        help="what a document is in .txt files (default: auto, blocks between blank lines); elsewhere it is a record",
    )
    group.add_argument(
        "--invalid-utf8",
        choices=INVALID_UTF8,
        default=_DEFAULTS.invalid_utf8,
        help="documents that are not UTF-8: stop, insert U+FFFD, or skip them (default: error)",
    )
    group.add_argument(
        "--bad-records",
        choices=BAD_RECORDS,
        default=_DEFAULTS.bad_records,
        help="records without text in the field, and documents that are too long: stop, or skip them (default: error)",
    )
    group.add_argument(
        "--max-document-bytes",
        type=int,
        default=_DEFAULTS.max_document_bytes,
        metavar="BYTES",
        help=f"longest document (default: {_DEFAULTS.max_document_bytes:,})",
    )


def read_options(arguments: argparse.Namespace) -> TextReadOptions:
    """The options that were given.

    Raises:
        ConfigError: as ``TextReadOptions``.
    """
    return TextReadOptions(
        format=arguments.format,
        text_field=arguments.text_field,
        document=arguments.document,
        invalid_utf8=arguments.invalid_utf8,
        bad_records=arguments.bad_records,
        max_document_bytes=arguments.max_document_bytes,
    )
