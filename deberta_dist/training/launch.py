"""From a launcher's command line to DeepSpeed's: ``python -m deberta_dist.training.launch SCRIPT ARGS``.

Called by ``launchers/start.sh``. It separates DeepSpeed's flags from the run's, adds what a machine without GPUs needs, and
execs ``deepspeed FLAGS SCRIPT REST`` (with ``--dry-run`` or ``--help``, ``python SCRIPT REST``, which starts no ranks). Imports
neither torch nor DeepSpeed, so that errors appear at once.
"""

import importlib.metadata
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import NamedTuple

from deberta_dist.config import Parallel
from deberta_dist.config.load import load_table
from deberta_dist.errors import ConfigError
from deberta_dist.training.arguments import DRY_RUN, HELP
from deberta_dist.training.hostfile import DEFAULT_HOSTFILE, check_placement

# DeepSpeed 0.19.8's own flags; a test compares both tables with its parser.
FLAGS_WITH_VALUE = frozenset(
    "-H --hostfile -i --include -e --exclude --num_nodes --num_gpus --num_accelerators --master_port "
    "--master_addr --node_rank --launcher --launcher_args --enable_each_rank_log --autotuning "
    "--bind_core_list --ssh_port --venv_script --log_level".split()
)
FLAGS_ALONE = frozenset(
    "--module --no_python --no_local_rank --no_ssh --no_ssh_check --force_multi --save_pid "
    "--bind_cores_to_rank -q --quiet".split()
)
# If one of these is given, the user has said which processes to start, and no --num_gpus is added.
PLACEMENT_FLAGS = frozenset("-H --hostfile -i --include -e --exclude --num_nodes --num_gpus --num_accelerators".split())
# With one of these the script prints something and starts no ranks.
ALONE = (DRY_RUN, *HELP)
# The launchers are Python files to DeepSpeed, started with --local_rank.
IMPOSSIBLE_FLAGS = frozenset(("--module", "--no_python"))


class SortedArguments(NamedTuple):
    """A launcher's arguments, by who reads them; ``is_alone``: the script only prints something and no ranks are started."""

    deepspeed: list[str]
    script: list[str]
    is_alone: bool

    def names(self) -> set[str]:
        """DeepSpeed flags that are present, without their values."""
        return {flag.partition("=")[0] for flag in self.deepspeed if flag.startswith("-")}

    def value(self, *names: str) -> str | None:
        """Value of the last of these DeepSpeed flags, or None if none is present."""
        found = None
        for index, flag in enumerate(self.deepspeed):
            name, equals, text = flag.partition("=")
            if name in names:
                found = text if equals else self.deepspeed[index + 1]
        return found


def split_arguments(arguments: Sequence[str]) -> SortedArguments:
    """Sorts arguments into DeepSpeed's flags and the script's, each in the order given.

    Raises:
        ConfigError: A DeepSpeed flag without its value, or one that cannot be used with a launcher.
    """
    split = SortedArguments([], [], any(word in arguments for word in ALONE))
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, _ = argument.partition("=")
        if name in IMPOSSIBLE_FLAGS:
            raise ConfigError(f"command line: {name} cannot be used: the launcher is a Python file to DeepSpeed")
        if name in FLAGS_ALONE:
            split.deepspeed.append(argument)
        elif name in FLAGS_WITH_VALUE:
            if not equals and not rest:
                raise ConfigError(f"command line: {name} has no value")
            if equals:
                split.deepspeed.append(argument)
            elif name.startswith("--"):
                # One word: DeepSpeed would read a value such as "--oversubscribe" as a flag.
                split.deepspeed.append(f"{name}={rest.pop(0)}")
            else:
                split.deepspeed.extend((name, rest.pop(0)))
        else:
            split.script.append(argument)
            if name.startswith("--") and "." in name and not equals and rest:  # --section.key value
                split.script.append(rest.pop(0))
    return split


def has_gpu(environment: Mapping[str, str]) -> bool:
    """Whether DeepSpeed will find accelerators here, without importing torch.

    A driver that does not answer counts as no GPU.
    """
    if wanted := environment.get("DS_ACCELERATOR"):
        return wanted != "cpu"
    if environment.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return False
    try:
        if importlib.metadata.version("torch").endswith("+cpu"):
            return False  # torch's CPU build cannot use a GPU
    except importlib.metadata.PackageNotFoundError:
        pass
    if any(Path("/proc/driver/nvidia/gpus").glob("*")) or Path("/dev/kfd").exists():
        return True
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listing.returncode == 0 and "GPU " in listing.stdout


def processes_needed(script: Path, script_arguments: Sequence[str]) -> int:
    """tensor x pipeline x data parallel size ("auto" = 1) of a launcher's TOML with its overrides.

    Raises:
        ConfigError: The TOML cannot be read or its [parallel] is wrong.
    """
    overrides = []
    for index, argument in enumerate(script_arguments):
        if argument.startswith("--parallel."):
            overrides += [argument] if "=" in argument else script_arguments[index : index + 2]
    parallel = load_table(script.with_suffix(".toml"), overrides, "parallel", Parallel)
    replicas = 1 if parallel.data_parallel_size == "auto" else parallel.data_parallel_size
    return parallel.tensor_parallel_size * parallel.pipeline_parallel_size * replicas


def command(
    script: Path, split: SortedArguments, environment: MutableMapping[str, str], *, start: tuple[str, str] | None = None
) -> list[str]:
    """The command to execute; adds to ``environment`` what DeepSpeed needs on a machine without GPUs.

    Args:
        script: A launcher, whose Python half every process runs; or, with ``start``, the TOML of a run.
        split: Its arguments, from ``split_arguments``.
        environment: The environment that the command will run in; changed in place.
        start: Instead of a launcher, the module that every process runs and its first argument; the TOML is the second.

    Raises:
        ConfigError: DeepSpeed's flags name no machines, or wrong ones; see also ``processes_needed``.
    """
    check_placement(split.value, split.names())
    gpu = has_gpu(environment)
    if not gpu:
        environment.setdefault("DS_ACCELERATOR", "cpu")
    program = [*(start or ()), str(script)]
    if split.is_alone:
        return [sys.executable, *(["-m"] if start else []), *program, *split.script]
    flags = list(split.deepspeed)
    local = not os.path.isfile(DEFAULT_HOSTFILE) and split.value("-H", "--hostfile") is None
    if local and "--master_port" not in split.names():
        flags.append(f"--master_port={_free_port()}")  # two runs on one machine would collide on the default
    if not gpu:
        count = split.value("--num_gpus", "--num_accelerators")
        if local and not split.names() & PLACEMENT_FLAGS:
            count = str(processes_needed(script, split.script))
            flags.append(f"--num_gpus={count}")
        if count is not None and count.isdecimal():
            # DeepSpeed lets every process use all cores: n processes would start n times more threads than cores.
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // max(1, int(count)))))
    return ["deepspeed", *flags, *(["--module"] if start else []), *program, *split.script]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main(arguments: Sequence[str]) -> None:
    """Never returns: the process becomes DeepSpeed's launcher, or exits with an error's code."""
    if not arguments or not Path(arguments[0]).is_file():
        print("usage: python -m deberta_dist.training.launch LAUNCHER [arguments]", file=sys.stderr)
        sys.exit(2)
    environment = dict(os.environ)
    try:
        words = command(Path(arguments[0]), split_arguments(arguments[1:]), environment)
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    os.execvpe(words[0], words, environment)


if __name__ == "__main__":
    main(sys.argv[1:])
