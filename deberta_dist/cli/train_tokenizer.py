"""Trains a SentencePiece vocabulary with DeBERTa's special pieces, or copies a published one, and reports how it fits.

tools/train_tokenizer.py --input corpus/ --output spm.model --vocab-size 128000
tools/train_tokenizer.py --input corpus/ --output spm.model --published deberta-v3-base/spm.model
"""

import argparse
import dataclasses
import sys

from deberta_dist.data.vocabulary_options import (
    NORMALIZATION_RULES,
    VocabularyOptions,
    read_symbols,
)
from deberta_dist.errors import ConfigError, with_exit_code
from deberta_dist.preparation.reading.arguments import add_reading_arguments, read_options

VOCAB_SIZE = 128_000
# Much smaller samples may not contain 128,000 different pieces.
MAX_BYTES = 1 << 28


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make or take a sentencepiece vocabulary for DeBERTa.")
    add_reading_arguments(parser)
    parser.add_argument("--output", required=True, help="model file to make, spm.model; never replaced")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--vocab-size",
        type=int,
        default=VOCAB_SIZE,
        help=f"pieces, [PAD] [CLS] [SEP] [UNK] included, without [MASK]; at most 1,000,000 (default: {VOCAB_SIZE:,})",
    )
    kind.add_argument("--published", metavar="FILE", help="copy this spm.model instead of training one")
    parser.add_argument(
        "--max-bytes",
        type=int,
        default=MAX_BYTES,
        metavar="BYTES",
        help=f"train on an even sample of about this size (default: {MAX_BYTES:,})",
    )
    group = parser.add_argument_group("training", "not with --published")
    group.add_argument(
        "--character-coverage",
        type=float,
        metavar="FRACTION",
        help="share of all characters that become pieces, 0.98 to 1; the rarest are left out (default: 0.9995)",
    )
    group.add_argument(
        "--byte-fallback",
        action="store_const",
        const=True,
        help="add 256 byte pieces: a character without a piece becomes its bytes instead of [UNK]",
    )
    group.add_argument(
        "--user-defined-symbols",
        metavar="FILE",
        help="strings that are always one piece: a UTF-8 file, one string per line, no white space inside",
    )
    group.add_argument(
        "--normalization-rule",
        choices=NORMALIZATION_RULES,
        metavar="NAME",
        help=f"normalisation of the text, {' | '.join(NORMALIZATION_RULES)}. nfkc: Unicode's; cf: lower case, too; "
        "nmt: white space becomes spaces; identity: none (default: nmt_nfkc)",
    )
    group.add_argument(
        "--max-run-characters",
        type=int,
        metavar="CHARACTERS",
        help="longer runs without white space are cut before training, and counted (default: 1,000)",
    )
    return parser.parse_args()


def vocabulary_options(arguments: argparse.Namespace) -> VocabularyOptions:
    """The options for training that were given.

    Raises:
        ConfigError: one is given with --published, or a value is not allowed.
        DataError: the file of symbols is not as it should be.
    """
    given = {
        name: value
        for name in (field.name for field in dataclasses.fields(VocabularyOptions))
        if (value := getattr(arguments, name)) is not None
    }
    if given and arguments.published:
        name = next(iter(given)).replace("_", "-")
        raise ConfigError(f"--{name} is about training, and --published takes {arguments.published} as it is")
    if "user_defined_symbols" in given:
        given["user_defined_symbols"] = read_symbols(given["user_defined_symbols"])
    return VocabularyOptions(**given)


@with_exit_code
def main() -> int:
    """Runs the tool; the exit code is 0, or that of the error printed."""
    arguments = parse_arguments()
    from deberta_dist.data.tokenizer import version_warning
    from deberta_dist.preparation.vocabulary.vocabulary import report_path, take_published, train_vocabulary

    reading, options = read_options(arguments), vocabulary_options(arguments)
    inputs, output, max_bytes = arguments.input, arguments.output, arguments.max_bytes
    if arguments.published:
        made = take_published(inputs, output, model=arguments.published, reading=reading, max_bytes=max_bytes)
    else:
        if warning := version_warning():
            print(f"warning: {warning}", file=sys.stderr)
        size = arguments.vocab_size
        made = train_vocabulary(inputs, output, reading=reading, options=options, vocab_size=size, max_bytes=max_bytes)
    if made.passed_over:
        print(f"passed over beside the inputs: {made.passed_over}")
    print(f"{output}: {made.tokenizer.num_tokens:,} tokens with [MASK], SHA-256 {made.tokenizer.sha256}")
    if made.words and made.words.num_cut_runs:
        print(
            f"cut before training: {made.words.num_cut_runs:,} runs of more than {options.max_run_characters:,} "
            f"characters without white space, {made.words.num_cut_characters:,} characters together"
        )
    if made.fit.num_documents:
        print(f"{'text of the input' if arguments.published else 'held-out text'}: {made.fit}")
    else:
        print("no text to measure it on: 2% of the documents are held out, and there are too few of them")
    print(f"report: {report_path(output)}")
    return 0
