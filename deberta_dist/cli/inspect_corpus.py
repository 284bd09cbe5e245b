"""Shows what a token file, or a directory of them, holds. The exit code is 65 where --verify finds damage.

tools/inspect_corpus.py train.tokens --verify
tools/inspect_corpus.py train.tokens --tokenizer spm.model --document 17
tools/inspect_corpus.py books/ --verify
"""

import argparse
import json

from deberta_dist.errors import DataError, with_exit_code


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Show what a corpus holds.")
    parser.add_argument("path", metavar="CORPUS", help="token file, or directory of them with index.json")
    parser.add_argument("--tokenizer", help="sentencepiece model, spm.model: show documents as text, not ids")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--documents", type=int, default=0, metavar="N", help="show the first N documents")
    which.add_argument("--document", type=int, metavar="K", help="show document K, from 0")
    parser.add_argument("--verify", action="store_true", help="read all of it: checksum, ids and document offsets")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args()


@with_exit_code
def main() -> int:
    """Runs the tool; the exit code is 0, 65 for damage, or that of the error printed."""
    arguments = parse_arguments()
    from deberta_dist.data.tokenizer import Tokenizer
    from deberta_dist.preparation.formats import inspect

    found = inspect.inspect(
        arguments.path,
        tokenizer=None if arguments.tokenizer is None else Tokenizer(arguments.tokenizer),
        num_documents=arguments.documents,
        document=arguments.document,
        verify=arguments.verify,
    )
    print(json.dumps(found, indent=1, allow_nan=False) if arguments.json else inspect.describe(found))
    return DataError.exit_code if inspect.is_damaged(found["verified"]) else 0
