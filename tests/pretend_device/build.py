"""Builds the device's C++ part once and loads it.

The library depends on torch and the compiler alone, so it is kept in pytest's cache directory under a key of both and of
its source. Building takes about ten seconds of CPU time, loading none.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch.utils import cpp_extension

SOURCE = Path(__file__).with_name("backend.cpp")
CACHE = Path(__file__).parents[2] / ".pytest_cache" / "pretend_device"
# -O1 makes calls several times as fast as -O0 and costs no time here.
FLAGS = ("-shared", "-fPIC", "-std=c++20", "-O1")


@functools.cache
def load() -> ctypes.CDLL:
    """The library, in this process. It registers nothing before its functions are called.

    Raises:
        RuntimeError: see `build`.
    """
    return ctypes.CDLL(str(build()))


def build(cache: Path = CACHE) -> Path:
    """Path of the library for this torch, built if it is not there.

    Args:
        cache: Directory of built libraries.

    Raises:
        RuntimeError: there is no C++ compiler, or it fails.
    """
    compiler = find_compiler()
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout.splitlines()[0]
    key = hashlib.sha256("\n".join([torch.__version__, version, *FLAGS, SOURCE.read_text()]).encode()).hexdigest()[:16]
    library = cache / f"backend-torch-{torch.__version__}-{key}.so"
    cache.mkdir(parents=True, exist_ok=True)
    # Of several processes one builds; the others wait for it and find the library.
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(compiler, library)
    return library


def find_compiler() -> str:
    """The compiler that torch's own extensions would take.

    Raises:
        RuntimeError: there is none.
    """
    names = [os.environ.get("CXX", "c++"), "g++", "clang++"]
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        raise RuntimeError(f"tests/pretend_device needs a C++ compiler; none of {', '.join(names)} is on PATH")
    return compiler


def _compile(compiler: str, library: Path) -> None:
    include = [word for path in cpp_extension.include_paths() for word in ("-isystem", path)]
    search = [f"-L{path}" for path in cpp_extension.library_paths()]
    with tempfile.TemporaryDirectory(dir=library.parent) as directory:
        built = Path(directory) / library.name
        command = [compiler, *FLAGS, *include, str(SOURCE), *search, "-ltorch_cpu", "-lc10", "-o", str(built)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")
        # A process that is killed while it builds leaves no half of a library.
        os.replace(built, library)
