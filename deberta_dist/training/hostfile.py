"""Checks the hostfile and DeepSpeed's placement flags before anything starts.

DeepSpeed silently trains on the local machine alone if the hostfile does not exist, silently uses fewer nodes than
``--num_nodes`` if there are fewer, and ends in a traceback for most other mistakes. ``launch.py`` calls ``check_placement``
before it execs DeepSpeed's launcher; if the user has called that launcher directly, ``check_front`` finds it among a rank's
parent processes. Imports neither torch nor DeepSpeed.
"""

import base64
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence, Set
from pathlib import Path

from deberta_dist.errors import ConfigError, printable

DEFAULT_HOSTFILE = "/job/hostfile"  # DeepSpeed's default for --hostfile
LOCAL = "localhost"
FORM = 'one line "NAME slots=NUMBER" for each machine'
MAX_BYTES = 1 << 22
# DeepSpeed's launcher, by file name or module.
FRONTS = ("deepspeed", "deepspeed.pt", "ds", "deepspeed.launcher.runner")
_LINE = re.compile(r"(\S+)\s+slots=(\d{1,6})(\s.*)?")
_ABOVE = 8  # parent processes to look at

Value = Callable[..., str | None]
"""(names of a flag) -> its last value, None where it is absent."""


def read_hostfile(path: str | os.PathLike[str]) -> dict[str, int]:
    """Machines and their slots (processes), in the order of the file.

    Raises:
        ConfigError: there is no such file, a line has another form, or a machine is listed twice or has no slots.
    """
    where = f"--hostfile {path}"
    if not os.path.isfile(path):
        what = "is no file" if os.path.exists(path) else "does not exist"
        raise ConfigError(f"command line: {where} {what}; expected {FORM}, or leave the flag out for this machine alone")
    try:
        if os.path.getsize(path) > MAX_BYTES:
            raise ConfigError(f"{where}: {os.path.getsize(path)} bytes is no hostfile; expected {FORM}")
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"command line: {where} cannot be read ({error.strerror})") from None
    except ValueError:
        raise ConfigError(f"{where}: not a text file; expected {FORM}") from None
    if text.startswith("\ufeff"):  # DeepSpeed takes it for a letter of the first name
        raise ConfigError(f"{where}, line 1: a byte-order mark; save the file as UTF-8 without one")
    hosts: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line)
        if found is None:
            raise ConfigError(f'{where}, line {number}: "{printable(line)}"; expected NAME slots=NUMBER, e.g. node1 slots=8')
        host, slots = found[1], int(found[2])
        if host in hosts:
            raise ConfigError(f"{where}, line {number}: {printable(host)} is listed twice; remove one of the lines")
        if slots == 0:
            raise ConfigError(f"{where}, line {number}: {printable(host)} has slots=0; give it 1 or more, or take the line out")
        hosts[host] = slots
    if not hosts:
        raise ConfigError(f"{where} names no machine; expected {FORM}")
    return hosts


def check_placement(value: Value, flags: Set[str]) -> None:
    """Checks the hostfile and the flags that choose among its machines.

    Args:
        value: Looks up values of DeepSpeed's flags.
        flags: Names of DeepSpeed's flags on the command line.

    Raises:
        ConfigError: a mistake that DeepSpeed would fail on, or silently ignore.
    """
    path = value("-H", "--hostfile")
    if path is None and os.path.isfile(DEFAULT_HOSTFILE):
        path = DEFAULT_HOSTFILE
    hosts = None if path is None else read_hostfile(path)
    nodes, gpus = _count(value, "--num_nodes"), _count(value, "--num_gpus", "--num_accelerators")
    include, exclude = value("-i", "--include"), value("-e", "--exclude")
    if include and exclude:
        raise ConfigError("command line: --include and --exclude cannot be given together")
    if (include or exclude) and (nodes or gpus):
        raise ConfigError("command line: --num_nodes and --num_gpus cannot be given together with --include or --exclude")
    if hosts is None:
        if nodes is not None and nodes > 1:
            raise ConfigError(f"command line: --num_nodes {nodes} needs a --hostfile that names them")
        left = _chosen({LOCAL: None}, include or exclude or "", "this machine (no --hostfile is given)")
        names = [LOCAL]
    else:
        left = _chosen(hosts, include or exclude or "", f"--hostfile {path}")
        names = list(hosts)[:nodes]
        if nodes is not None and nodes > len(hosts):
            raise ConfigError(f"command line: --num_nodes {nodes} is more than the {len(hosts)} of --hostfile {path}")
        few = [name for name in names if gpus is not None and hosts[name] < gpus]
        if few:
            raise ConfigError(
                f"command line: --num_gpus {gpus} is more than slots={hosts[few[0]]} of {printable(few[0])} in --hostfile {path}"
            )
        if include:
            names = list(left)
        elif exclude:
            names = [name for name in hosts if name not in left or (left[name] and len(left[name]) < hosts[name])]
            if not names:
                raise ConfigError(f"command line: --exclude {exclude} leaves no machine of --hostfile {path}")
    if "--no_ssh" in flags:
        rank = value("--node_rank")
        if rank is None or not rank.isdecimal() or int(rank) >= len(names):
            raise ConfigError(
                f"command line: --no_ssh needs --node_rank, the number of this machine, 0 to {len(names) - 1}; got {rank}"
            )


def check_front(with_value: Set[str]) -> None:
    """Finds DeepSpeed's launcher among the parent processes and checks the hostfile it was given.

    Checks nothing on nodes where the launcher does not run, or on systems without /proc.

    Args:
        with_value: DeepSpeed's flags that take a value.

    Raises:
        ConfigError: the launcher found no hostfile and started on the local machine alone.
    """
    is_local = False
    for words in _commands_above():
        for word in words:
            if word.startswith("--world_info="):
                is_local = _machines(word.partition("=")[2]) == {LOCAL}
        front = next((number for number, word in enumerate(words[:4]) if word.rpartition("/")[2] in FRONTS), None)
        if front is None:
            continue
        path = _hostfile_of(words[front + 1 :], with_value)
        if path is not None and is_local and not os.path.isfile(path):
            read_hostfile(path)
        return


def _count(value: Value, *names: str) -> int | None:
    text = value(*names)
    if text is None or text == "-1":  # DeepSpeed's default
        return None
    if not re.fullmatch(r"[1-9]\d{0,6}", text):
        raise ConfigError(f"command line: {names[0]} {text!r}; expected a number from 1 on")
    return int(text)


def _chosen(hosts: dict[str, int] | dict[str, None], text: str, where: str) -> dict[str, list[int]]:
    """NODE[:SLOT[,SLOT...]][@NODE...] -> {node: slots, none for all}."""
    found: dict[str, list[int]] = {}
    for part in text.split("@") if text else []:
        name, colon, slots = part.partition(":")
        if name not in hosts:
            raise ConfigError(f"command line: {part!r} names no machine of {where}: {', '.join(list(hosts)[:10])}")
        if colon and not re.fullmatch(r"\d{1,6}(,\d{1,6})*", slots):
            raise ConfigError(f"command line: {part!r}; expected NAME or NAME:SLOT,SLOT,... joined by @")
        found[name] = sorted({*found.get(name, []), *(int(slot) for slot in slots.split(",") if colon)})
        most = hosts[name]
        if most is not None and any(slot >= most for slot in found[name]):
            raise ConfigError(f"command line: {part!r}: {name} has slots 0 to {most - 1} in {where}")
    return found


def _commands_above() -> Iterator[list[str]]:
    """Command lines of the processes above this one, nearest first."""
    pid = os.getppid()
    for _ in range(_ABOVE):
        if pid <= 1:
            return
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "surrogateescape").split("\0")
            # pid (name) state ppid: the name may hold anything
            pid = int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            return
        yield words


def _machines(text: str) -> set[str]:
    try:
        return set(json.loads(base64.urlsafe_b64decode(text)))
    except ValueError:
        return set()


def _hostfile_of(words: Sequence[str], with_value: Set[str]) -> str | None:
    """The hostfile among the flags of DeepSpeed's launcher, which end with the script."""
    found, rest = None, list(words)
    while rest and rest[0].startswith("-"):
        name, equals, text = rest.pop(0).partition("=")
        # argparse accepts unique prefixes of a flag, too
        is_hostfile = name == "-H" or (len(name) > 3 and "--hostfile".startswith(name))
        if not equals and rest and (is_hostfile or name in with_value):
            text = rest.pop(0)
        if is_hostfile:
            found = text
    return found
