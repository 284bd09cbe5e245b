"""Runs a script on a small file system of its own: on_small_disk.py DIRECTORY SIZE[,SIZE...] SCRIPT [ARGUMENT...].

A file system in memory is mounted on DIRECTORY, which this process and its children alone see; for every further SIZE it is
made so large and the script is started again. After each start: its exit code and what lies in DIRECTORY and below.
"""

import ctypes
import os
import runpy
import sys
import traceback
from pathlib import Path

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
MS_REMOUNT = 32
_LIBRARY = ctypes.CDLL(None, use_errno=True)


def require(result: int, what: str) -> None:
    if result:
        raise OSError(ctypes.get_errno(), what)


def own_mounts() -> None:
    """From here on this process, which has one thread, mounts for itself, as an ordinary user may."""
    user, group = os.getuid(), os.getgid()
    require(_LIBRARY.unshare(CLONE_NEWUSER | CLONE_NEWNS), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        Path("/proc/self", name).write_text(text)


def mount(directory: str, size: str, *, flags: int) -> None:
    require(_LIBRARY.mount(b"none", directory.encode(), b"tmpfs", ctypes.c_ulong(flags), f"size={size}".encode()), "mount")


def run(words: list[str]) -> int:
    """Exit code of the script, run in a child."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(directory: str, sizes: str, *words: str) -> None:
    own_mounts()
    for number, size in enumerate(sizes.split(","), start=1):
        mount(directory, size, flags=MS_REMOUNT if number > 1 else 0)
        code = run(list(words))
        found = sorted(
            str(path.relative_to(directory)) for pattern in ("*", "checkpoints/*") for path in Path(directory).glob(pattern)
        )
        print(f"start {number}: {code}, leaves:", *found, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
