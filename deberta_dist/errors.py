"""Errors a user can cause, and the exit code each ends the process with.

Everything the package refuses is one of these, raised with what was given, what was expected and where
to change it. ``main`` of every entry point prints the message as one line and exits with ``exit_code``;
any other exception is a fault of ours and keeps its traceback.
"""

import errno
import functools
import importlib.util
import io
import os
import sys
from collections.abc import Callable

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of the errors of a full disk, a used-up quota and a file as large as may be."""


class DebertaDistError(Exception):
    """Base of all errors with a message meant for the user."""

    exit_code = 1


class ConfigError(DebertaDistError, ValueError):
    """A configuration file, an override or a combination of sizes that cannot be run."""

    exit_code = 2


class DataError(DebertaDistError, ValueError):
    """An input file (text, token file, tokenizer) that is missing, damaged or does not fit the run."""

    exit_code = 65


class UnfinishedError(DebertaDistError):
    """Work that ended early through nothing in its input: the same command goes on where it ended."""

    exit_code = 75


class DivergedError(DebertaDistError):
    """Gradients stayed non-finite; the run cannot go on."""

    exit_code = 76


# What `pip install deberta_dist` leaves out, and the extra that brings it.
_EXTRAS = {
    "deepspeed": "train",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
    "pyarrow": "data",
    "zstandard": "data",
    "rensa": "data",
    "mpi4py": "mpi",
    "transformers": "huggingface",
    "triton": "triton",
}
_CORE = ("filelock", "numpy", "pydantic", "safetensors", "sentencepiece", "torch", "tqdm")


def missing_package(name: str) -> str:
    """What to say where a package cannot be imported because it is not installed."""
    extra = f"[{_EXTRAS[name]}]" if name in _EXTRAS else ""
    return f"{name} is not installed: pip install 'deberta_dist{extra}'"


def require_packages(*names: str) -> None:
    """Refuses to begin what a missing package would end.

    Raises:
        ConfigError: one cannot be imported; the message has the command that installs it.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(missing_package(name))


def printable(name: str) -> str:
    """A name out of a file as it can be printed: it may be long, or hold line ends or a terminal's commands."""
    return name[:200] if name.isprintable() else ascii(name[:200])


def encodable(name: str) -> str:
    """A path as it can be written to a file: it may hold bytes that are no text."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def with_exit_code(main: Callable[[], int]) -> Callable[[], int]:
    """Makes one line and an exit code of what can go wrong in a tool's ``main`` without being our fault.

    Beside our own errors: a package that is not installed (2), a file that cannot be read or written (74), a reader of the output that has gone away
    (141), an interrupt (130).
    """

    @functools.wraps(main)
    def wrapped() -> int:
        if isinstance(sys.stdout, io.TextIOWrapper):
            # A pipe of another encoding than UTF-8, as on Windows, is no reason to end in the middle of a result.
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            return main()
        except DebertaDistError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        except ModuleNotFoundError as error:
            # A module that a package of ours lacks is another matter: a fault.
            if error.name not in (*_EXTRAS, *_CORE):
                raise
            print(f"error: {missing_package(error.name)}", file=sys.stderr)
            return ConfigError.exit_code
        except BrokenPipeError:
            # The interpreter would flush once more at its end, and complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except OSError as error:
            print(f"error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
            return 74
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return wrapped
