"""Searches the layouts of a run on N GPUs: the fastest that fit, what each costs, and a TOML that runs the best.

tools/plan_layout.py --model xxlarge-v2 --gpus 64 --gpu h100 --global-batch 2048 --toml launchers/mine.toml
tools/plan_layout.py launchers/pretrain_1.5b.toml --gpus 64 --gpu a100-80 [--section.key value ...]
tools/plan_layout.py --model v2-xxlarge --gpu h100 --scaling 8,64,256,1024
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deberta_dist.config import RunConfig, load_config
from deberta_dist.errors import ConfigError, with_exit_code
from deberta_dist.files.shipped import is_installed, shipped
from deberta_dist.planning.machine import GPUS, PRODUCTS_REACH, WITHOUT_BF16, Machine, calibrated, read_calibration
from deberta_dist.values import OFFLOAD, RECOMPUTE, SCHEDULES

BASE = "launchers/pretrain_1.5b.toml"
JSONS = "ds_configs"
PAIRS = (("zero3_bf16.json", "zero3_offload.json"), ("zero3_fp16.json", "zero3_fp16_offload.json"))
"""DeepSpeed JSONs that differ in offload alone."""
STEPS = 1_000_000


def parse_arguments(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and its unknown words: overrides of the TOML."""
    parser = argparse.ArgumentParser(
        description="Search the layouts of a run on N GPUs. --section.key value overrides the TOML as in a launcher.",
        epilog="Times are a model's, not measurements; deberta_dist/planning/machine.py has the numbers and their sources.",
        allow_abbrev=False,
    )
    parser.add_argument("toml", nargs="?", help=f"a run's TOML: model, data and recipe (default: {BASE})")
    parser.add_argument("--model", help="a published model instead of the TOML's: v2-xxlarge, xxlarge-v2, ...")
    parser.add_argument("--gpus", "--world-size", dest="gpus", type=_count, help="processes, one per GPU")
    parser.add_argument(
        "--scaling", type=_counts, metavar="N,N,...", help="instead of --gpus: the best layout for each number of GPUs"
    )
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100", help="default: %(default)s")
    parser.add_argument("--global-batch", type=_count, help="sequences per step (default: the TOML's)")
    parser.add_argument(
        "--show", type=_count, default=8, help="layouts to list, of different tensor x pipeline x data sizes (default: 8)"
    )
    parser.add_argument("--toml", dest="output", type=Path, metavar="FILE", help="write the TOML of the best layout here")
    parser.add_argument("--force", action="store_true", help="replace the file of --toml")
    parser.add_argument("--price-per-gpu-hour", type=_positive, metavar="PRICE", help="for the cost, in any currency")
    parser.add_argument(
        "--steps", type=_count, default=STEPS, help="length of the run, for its days and cost (default: 1000000)"
    )

    searched = parser.add_argument_group("what is searched (default: everything)")
    searched.add_argument("--tensor", type=_counts, metavar="N,...", help="tensor-parallel sizes")
    searched.add_argument("--pipeline", type=_counts, metavar="N,...", help="pipeline-parallel sizes")
    searched.add_argument("--micro-batch", type=_counts, metavar="N,...", help="sequences (default: what divides, up to 32)")
    searched.add_argument("--recompute", **_words(RECOMPUTE))
    searched.add_argument("--schedule", **_words(SCHEDULES))
    searched.add_argument("--offload", **_words(OFFLOAD), help="of the optimizer")

    _add_machine(parser)
    found, overrides = parser.parse_known_args(arguments)
    if (found.gpus is None) == (found.scaling is None):
        parser.error(f"exactly one of --gpus and --scaling is needed; {'both are' if found.gpus else 'neither is'} given")
    if found.scaling is not None and found.output is not None:
        parser.error("--toml writes one layout: give --gpus instead of --scaling")
    if found.toml is None and found.model is None:
        parser.error("a TOML or --model is needed")
    return found, overrides


def _add_machine(parser: argparse.ArgumentParser) -> None:
    """Flags that replace numbers of the data sheet."""
    machine = parser.add_argument_group(
        "the machine (default: the data sheet of --gpu, and the share of it that programs reach)"
    )
    machine.add_argument("--calibration", type=Path, metavar="FILE", help="measurements from deberta-dist calibrate")
    machine.add_argument("--gpu-memory", type=_positive, metavar="GB", help="memory of one GPU")
    machine.add_argument(
        "--memory-margin", type=_share, default=0.1, metavar="SHARE", help="share of the memory to leave free (default: 0.1)"
    )
    machine.add_argument("--peak", type=_positive, metavar="TFLOP/S", help="peak of one GPU's matrix products")
    machine.add_argument("--efficiency", type=_share, metavar="SHARE", help="share of the peak that matrix products reach")
    machine.add_argument("--memory-bandwidth", type=_positive, metavar="GB/S", help="bandwidth that passes over memory reach")
    machine.add_argument("--call-microseconds", type=_positive, metavar="US", help="time of the host per operation")
    machine.add_argument("--gpus-per-node", type=_count, metavar="N")
    machine.add_argument(
        "--node-bandwidth", type=_positive, metavar="GB/S", help="bandwidth of one GPU inside a node, each way"
    )
    machine.add_argument(
        "--network-bandwidth", type=_positive, metavar="GB/S", help="bandwidth of one GPU between nodes, each way"
    )
    machine.add_argument("--node-latency", type=_positive, metavar="US")
    machine.add_argument("--network-latency", type=_positive, metavar="US")
    machine.add_argument("--cores", type=_count, metavar="N", help="cores shared by all processes, where there are no GPUs")


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(sorted({_count(word) for word in text.split(",")}))


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return number


def _share(text: str) -> float:
    if not (text == "0" or 0 <= _positive(text) < 1):
        raise argparse.ArgumentTypeError(f"expected a share of at least 0 and less than 1, got {text!r}")
    return float(text)


def _words(known: Sequence[str]) -> dict[str, Any]:
    """The settings of an option that takes several words of ``known``, with commas between."""

    def words(text: str) -> tuple[str, ...]:
        given = tuple(dict.fromkeys(text.split(",")))
        for word in given:
            if word not in known:
                raise argparse.ArgumentTypeError(f"{word!r} is not one of {', '.join(known)}")
        return given

    return {"type": words, "metavar": f"{'|'.join(known)},..."}


def run_config(arguments: argparse.Namespace, overrides: Sequence[str]) -> RunConfig:
    """The run whose layouts are searched.

    Raises:
        ConfigError: as ``load_config``; or the model is not one.
    """
    from deberta_dist.models.presets import preset_name

    changed = []
    if arguments.model is not None:
        name = preset_name(arguments.model)
        changed = [f"--model.preset={name}"]
        if arguments.toml is None and not any(word.startswith("--run.directory") for word in overrides):
            changed.append(f"--run.directory={home() / 'runs' / f'pretrain_{name}'}")
    if arguments.global_batch is not None:
        changed.append(f"--training.global_batch_size={arguments.global_batch}")
    # What is searched for need not divide the batch that is asked for.
    searched = {"--training.micro_batch_size": "1", "--training.num_micro_batches": "auto"}
    changed += [f"{key}={value}" for key, value in searched.items() if not any(w.startswith(key) for w in overrides)]
    if arguments.toml is None and arguments.gpu in WITHOUT_BF16:
        changed.append(f"--run.deepspeed={shipped(JSONS) / PAIRS[1][0]}")
    if arguments.toml is None and is_installed():
        # The shipped TOML's relative paths would lead into the installed package.
        paths = {"data.train": "corpus/train", "data.validation": "corpus/heldout", "data.tokenizer": "spm.model"}
        changed += [f"--{key}={home() / 'data' / name}" for key, name in paths.items() if not _is_given(key, overrides)]
    return load_config(arguments.toml or shipped(BASE), [*changed, *overrides])


def home() -> Path:
    """Where a run without a TOML of its own has its data and its directory: the checkout, or the current directory."""
    return Path.cwd() if is_installed() else shipped(BASE).parents[1]


def _is_given(key: str, overrides: Sequence[str]) -> bool:
    return any(word.partition("=")[0] == f"--{key}" for word in overrides)


def machine_of(arguments: argparse.Namespace, *, processes: int) -> Machine:
    """The part of ``--gpu`` with what the flags and the calibration say.

    Raises:
        ConfigError: the calibration cannot be used.
    """
    machine, given = GPUS[arguments.gpu], arguments
    if given.calibration is not None:
        measured = read_calibration(given.calibration)
        machine = calibrated(machine, measured, processes=processes, source=str(given.calibration))
    changed = {
        "peak": given.peak and given.peak * 1e12,
        "memory": given.gpu_memory and given.gpu_memory * 1e9,
        "memory_bandwidth": given.memory_bandwidth and given.memory_bandwidth * 1e9,
        "seconds_per_call": given.call_microseconds and given.call_microseconds * 1e-6,
        "node_size": given.gpus_per_node,
        "cores": given.cores,
    }
    if given.efficiency and not (given.peak or machine.peak):
        raise ConfigError("--efficiency is a share of a peak, and this machine has none: add --peak")
    if given.peak or given.efficiency:
        share = given.efficiency or (machine.product_rate / machine.peak if machine.peak else PRODUCTS_REACH)
        changed["product_rate"] = share * (changed["peak"] or machine.peak)
    for name in ("node", "network"):
        bandwidth, latency = getattr(given, f"{name}_bandwidth"), getattr(given, f"{name}_latency")
        link = getattr(machine, name)
        changed[name] = dataclasses.replace(
            link,
            bandwidth=bandwidth * 1e9 if bandwidth else link.bandwidth,
            latency=latency * 1e-6 if latency else link.latency,
        )
    return dataclasses.replace(machine, **{key: value for key, value in changed.items() if value is not None})


def deepspeed_jsons(config: RunConfig, arguments: argparse.Namespace) -> tuple[Path, ...]:
    """The run's own JSON and its twin with the other offload, where it is one of the shipped ones.

    Raises:
        ConfigError: a format that the part does not have, or an offload that the run's own JSON does not.
    """
    from deberta_dist.config import offload_device, precision, resolve, smallest_world_size
    from deberta_dist.planning.deepspeed import checked_deepspeed

    own, jsons = config.run.deepspeed, shipped(JSONS)
    ds = checked_deepspeed(resolve(config, smallest_world_size(config))).values
    if precision(ds) == "bf16" and arguments.gpu in WITHOUT_BF16:
        raise ConfigError(
            f"run.deepspeed = {own} asks for bf16, which a {GPUS[arguments.gpu].name} does not have; add --run.deepspeed "
            f"{jsons / PAIRS[1][0]}"
        )
    pair = next((pair for pair in PAIRS if own in [jsons / name for name in pair]), None)
    if pair is not None:
        by_offload = dict(zip(("none", "cpu"), (jsons / name for name in pair), strict=True))
    else:
        by_offload = {offload_device(ds, "optimizer"): own}
    asked = arguments.offload or tuple(by_offload)
    missing = [word for word in asked if word not in by_offload]
    if missing:
        raise ConfigError(f"--offload {missing[0]}: run.deepspeed = {own} has another one; name a JSON that has it")
    return tuple(by_offload[word] for word in asked)


@with_exit_code
def main() -> int:
    """Runs the tool; the exit code is 0, or that of the error printed."""
    arguments, overrides = parse_arguments()
    if arguments.output is not None and arguments.output.exists() and not arguments.force:
        raise ConfigError(f"--toml {arguments.output} exists; --force replaces it")
    config = run_config(arguments, overrides)
    jsons = deepspeed_jsons(config, arguments)
    # Torch comes in here: a wrong flag is said before.
    from deberta_dist.planning import layout_report as report
    from deberta_dist.planning.search import Space, restricted, search
    from deberta_dist.training.preview import preview_model
    from deberta_dist.training.vocabulary import resolve_vocabulary

    config = resolve_vocabulary(config)

    space = restricted(
        Space(deepspeed=jsons),
        tensor=arguments.tensor,
        pipeline=arguments.pipeline,
        micro_batch=arguments.micro_batch,
        largest_micro_batch=max(arguments.micro_batch) if arguments.micro_batch else None,
        recompute=arguments.recompute,
        schedules=arguments.schedule,
    )
    prices = report.Prices(steps=arguments.steps, per_hour=arguments.price_per_gpu_hour)
    rows = []
    for processes in arguments.scaling or (arguments.gpus,):
        machine = machine_of(arguments, processes=processes)
        limit = machine.memory * (1 - arguments.memory_margin)
        count = 1 if arguments.scaling else arguments.show
        found = search(config, world_size=processes, machine=machine, memory_limit=limit, space=space, count=count)
        if not found.choices:
            raise ConfigError(report.nothing_fits(found, processes=processes, limit=limit))
        rows.append((processes, found))
    for line in preview_model(rows[0][1].choices[0].plan):
        print(line, file=sys.stderr)
    if arguments.scaling:
        print(report.scaling(config, rows, machine=machine, prices=prices))
        return 0
    best = found.choices[0]
    print(report.describe(found, machine=machine, limit=limit, prices=prices))
    folder = home() if is_installed() else shipped(BASE).parent
    if arguments.output is not None:
        folder = arguments.output.absolute().parent
    text = report.toml_of(best, machine=machine, folder=folder)
    if arguments.output is None:
        print(f"\nThe TOML of the first line, as from {folder} (--toml FILE writes it):\n\n{text}", end="")
        return 0
    arguments.output.write_text(text, encoding="utf-8")
    print(f"\nwritten: {arguments.output}; {_start_command(arguments.output)}")
    return 0


def _start_command(toml: Path) -> str:
    launcher = toml.with_suffix(".sh")
    if is_installed():
        return f"deberta-dist pretrain {toml} --hostfile hosts"
    copy = "" if launcher.exists() else f"cp {shipped(BASE).with_suffix('.sh')} {launcher} && "
    return f"{copy}deepspeed --hostfile hosts {launcher}"
