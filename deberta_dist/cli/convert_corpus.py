"""Converts a corpus of ids between a token file and Megatron's .idx and .bin. Nothing is replaced.

tools/convert_corpus.py megatron/corpus.idx corpus.tokens --tokenizer spm.model --strip-eod 2
tools/convert_corpus.py corpus.tokens megatron/corpus --tokenizer spm.model --append-eod 2
"""

import argparse

from deberta_dist.errors import with_exit_code


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Convert a corpus between a token file and a Megatron dataset.")
    parser.add_argument(
        "source", metavar="SOURCE", help="X.tokens, a directory of them with index.json, or X.idx (or X.bin) of Megatron"
    )
    parser.add_argument("target", metavar="TARGET", help="Y.tokens, or the prefix Y of Y.idx and Y.bin")
    parser.add_argument("--tokenizer", required=True, help="sentencepiece model, spm.model, that made the ids")
    parser.add_argument("--strip-eod", type=int, metavar="ID", help="from Megatron: drop this id where a document ends with it")
    parser.add_argument("--append-eod", type=int, metavar="ID", help="to Megatron: end each document with this id")
    return parser.parse_args()


@with_exit_code
def main() -> int:
    """Runs the tool; the exit code is 0, or that of the error printed."""
    arguments = parse_arguments()
    from deberta_dist.data.tokenizer import Tokenizer
    from deberta_dist.preparation.formats.convert import convert_corpus

    report = convert_corpus(
        arguments.source,
        arguments.target,
        tokenizer=Tokenizer(arguments.tokenizer),
        strip_eod=arguments.strip_eod,
        append_eod=arguments.append_eod,
    )
    lines = [f"{report.num_tokens:,} tokens in {report.num_documents:,} documents"]
    if report.num_empty_documents:
        lines.append(f"{report.num_empty_documents:,} empty documents skipped")
    for option, verb in ((arguments.strip_eod, "dropped"), (arguments.append_eod, "appended")):
        if option is not None:
            lines.append(f"id {option} {verb} at the end of {report.num_eod:,}")
    print(f"{' and '.join(map(str, report.paths))}: {', '.join(lines)}")
    return 0
