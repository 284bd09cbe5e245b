"""The console script ``deberta-dist`` and ``python -m deberta_dist``: finds the verb and passes the rest of the line to it."""

import difflib
import importlib
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

import deberta_dist
from deberta_dist.errors import ConfigError, with_exit_code

NAME = "deberta-dist"
# A bare verb acts on a run or a checkpoint; any other names its object. The module is the verb with underscores.
VERBS = {
    "A run": {
        "init": "write the launcher, TOML and DeepSpeed JSON of a new run",
        "plan": "search the layouts of a run on a number of GPUs",
        "calibrate": "measure this machine for plan",
        "pretrain": "start a pre-training run, or --dry-run it",
        "finetune": "fine-tune a checkpoint on a benchmark",
        "report": "report the scores of fine-tuning runs",
    },
    "A checkpoint": {
        "convert": "convert between our format, the published ones, Hugging Face's and ONNX",
        "inspect": "show what a checkpoint is, and how two differ",
        "fill-mask": "fill the masks of a text",
    },
    "Data and benchmarks": {
        "train-tokenizer": "train a SentencePiece vocabulary, or copy a published one",
        "prepare-corpus": "turn text into token files",
        "convert-corpus": "convert between token files and Megatron's",
        "inspect-corpus": "show what token files hold",
        "make-submission": "make a submission, or --validate one",
    },
}


def usage() -> str:
    """What ``--help`` prints: every verb with one line about it."""
    lines = [f"usage: {NAME} VERB [arguments]", "", f"{NAME} VERB --help explains a verb; {NAME} --version prints the version."]
    for title, verbs in VERBS.items():
        lines += ["", f"{title}:", *(f"  {verb:<16} {about}" for verb, about in verbs.items())]
    return "\n".join(lines)


def module_of(verb: str) -> str:
    """Dotted name of a verb's module.

    Raises:
        ConfigError: no such verb; the message lists them and suggests the nearest.
    """
    known = [name for verbs in VERBS.values() for name in verbs]
    if verb not in known:
        near = difflib.get_close_matches(verb.replace("_", "-").lower(), known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"{verb[:80]!r} is not a verb of {NAME}; {hint}The verbs are {', '.join(known)}")
    return f"deberta_dist.cli.{verb.replace('-', '_')}"


@with_exit_code
def main() -> int:
    """Runs the verb of ``sys.argv``; the exit code is the verb's, 2 without one."""
    if len(sys.argv) < 2:
        print(usage(), file=sys.stderr)
        return ConfigError.exit_code
    verb, *rest = sys.argv[1:]
    if verb in ("-h", "--help"):
        print(usage())
        return 0
    if verb == "--version":
        print(f"{NAME} {deberta_dist.__version__}")
        return 0
    module = importlib.import_module(module_of(verb))
    # A verb's parser reads sys.argv as a tool's does: usage lines then begin with what was typed.
    sys.argv[:] = [f"{NAME} {verb}", *rest]
    return module.main()


def run(program: Callable[[], int] = main) -> NoReturn:
    """Ends the process with what a ``main`` returns. The console script, and every file in ``tools/``, starts here."""

    def stop(number: int, frame: object) -> NoReturn:
        sys.exit(128 + number)

    # As on an interrupt: workers are ended and unfinished files removed.
    signal.signal(signal.SIGTERM, stop)
    sys.exit(program())
