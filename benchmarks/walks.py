#!/usr/bin/env python
"""Counts the files of the package that a value enters on its way through it: a measure of how far apart things stand.

    python benchmarks/walks.py                        # a table
    python benchmarks/walks.py --json walks.json      # and the files
    python benchmarks/walks.py --checkout ../other    # of another checkout

Five values are followed through real, tiny runs of the command lines, with every process and thread of them watched
(``sys.setprofile``). **A value enters a file if, when a function of that file returns or yields, one of its arguments or
local variables, or what it returns, is the value or has it one level down**: as an attribute of an object, as an item of
a list, tuple or set, as a key or value of a dictionary. Two levels down does not count: who passes a whole run's settings
on has not touched a key. What is "the value" is a property of data, so that no name of a file, class or function stands
here and the same script measures any state of the code:

=============  ==================================================================================================
batch          a tensor or array with a dimension of the sequence length, 29, or of 29 x the sequences of a
               micro-batch, 87; no other size of the model is one of these. From the launcher to the kernels and
               back; relative-position tables of that length count as well.
weight         a tensor or array whose memory holds eight numbers that the finished run has in a row of the first
               layer's query projection. The learning rate is 1e-15, so that these bits are the same from the
               initial value to the saved slice, flat, gathered or cut.
config key     ``optimizer.eps`` = 1.2345678e-6: a float that is that, or a string that spells it. From the TOML to
               the optimizer.
row            one row of RTE, to train on, to score on and to answer: a string with its words, integers (list, array
               or tensor) with the token ids of these words in order, its ``idx`` 91827364 as number or key. From the
               file to the prediction; the hidden states made of it are the batch's walk.
document       one document: a string or bytes with its words, or integers with their ids. From the text to the
               token file.
=============  ==================================================================================================

Four processes pre-train (tensor 2 x pipeline 2), one fine-tunes, one prepares: what runs in none of these layouts, on a GPU
for instance, is not in the count.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

SETTINGS = "DEBERTA_DIST_WALKS"
LENGTH, MICRO_BATCH = 29, 3
EPS = 1.2345678e-06
WORDS = "the zebra quietly examined seventeen purple umbrellas behind a frozen lighthouse"
IDX = 91827364
LARGEST_ARRAY = 1 << 22
LONGEST_CONTAINER = 2000

# --- In the watched processes: what holds a value, and the hook.


def _numbers(value: Any) -> Any:
    """A tensor's or array's numbers as a numpy array, None for anything else and for what has no numbers."""
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if torch is not None and isinstance(value, getattr(torch, "Tensor", ())):
        if value.device.type != "cpu" or value.layout is not torch.strided or value.is_quantized:
            return None
        try:
            value = value.detach().numpy()
        except (RuntimeError, TypeError):  # a number format that numpy lacks, a tensor without memory
            return None
    if numpy is not None and isinstance(value, getattr(numpy, "ndarray", ())) and value.size <= LARGEST_ARRAY:
        return value
    return None


def _shape(value: Any) -> tuple[int, ...]:
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    kinds = tuple(kind for kind in (getattr(torch, "Tensor", None), getattr(numpy, "ndarray", None)) if kind is not None)
    return tuple(value.shape) if kinds and isinstance(value, kinds) else ()


def _is_batch(value: Any) -> bool:
    return bool({LENGTH, LENGTH * MICRO_BATCH} & set(_shape(value)))


def _is_weight(marker: bytes) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        array = _numbers(value)
        return array is not None and array.dtype == "float32" and marker in array.tobytes()

    return check


def _is_key(value: Any) -> bool:
    return value == EPS if isinstance(value, float) else isinstance(value, str) and repr(EPS)[:9] in value


def _is_text(ids: list[int], *, words: str, idx: int | None) -> Callable[[Any], bool]:
    import numpy

    wide = numpy.array(ids, dtype=numpy.int64).tobytes()
    written = [words.encode()] + [numpy.array(ids, dtype=kind).tobytes() for kind in ("<u2", "<u4", "<i4", "<i8")]

    def check(value: Any) -> bool:
        if isinstance(value, str):
            return words in value or (idx is not None and value == str(idx))
        if isinstance(value, int):
            return idx is not None and value == idx
        if isinstance(value, (bytes, bytearray)):
            return len(value) <= LARGEST_ARRAY and any(form in value for form in written)
        if isinstance(value, (list, tuple)):
            if not value or len(value) > LARGEST_ARRAY or any(type(item) is not int for item in value):
                return False
            value = numpy.array(value)
        array = _numbers(value)
        return array is not None and array.dtype.kind in "iu" and wide in array.astype(numpy.int64).tobytes()

    return check


def _one_level_down(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        if len(value) <= LONGEST_CONTAINER:
            yield from value.keys()
            yield from value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        if len(value) <= LONGEST_CONTAINER:
            yield from value
    elif not isinstance(value, (type, str, bytes, type(sys))) and not callable(value):
        yield from getattr(value, "__dict__", {}).values()
        for name in getattr(type(value), "__slots__", ()):
            yield getattr(value, name, None)


def _holds(check: Callable[[Any], bool], values: list[Any]) -> bool:
    return any(check(value) or any(map(check, _one_level_down(value))) for value in values)


def install(settings: dict[str, Any]) -> None:
    """Watches this process: every file that a value enters is a line in a file of its own, written at once."""
    package, log = settings["package"] + os.sep, settings["log"]
    checks: dict[str, Callable[[Any], bool]] | None = None
    found: dict[str, set[str]] = {}
    code_files: dict[Any, str | None] = {}

    def prepared() -> dict[str, Callable[[Any], bool]]:
        made: dict[str, Callable[[Any], bool]] = {}
        for walk in settings["walks"]:
            if walk == "batch":
                made[walk] = _is_batch
            elif walk == "weight":
                made[walk] = _is_weight(bytes.fromhex(settings["weight"]))
            elif walk == "config key":
                made[walk] = _is_key
            else:
                made[walk] = _is_text(settings["ids"], words=WORDS, idx=IDX if walk == "row" else None)
        return made

    def hook(frame: FrameType, event: str, result: Any) -> None:
        nonlocal checks
        if event != "return":
            return
        code = frame.f_code
        if code not in code_files:
            name = code.co_filename
            code_files[code] = name[len(package) :] if name.startswith(package) else None
        file = code_files[code]
        # The body of a module holds its constants, not a value that passes.
        if file is None or code.co_name == "<module>":
            return
        if checks is None:
            checks = prepared()
        seen = found.setdefault(file, set())
        left = [walk for walk in checks if walk not in seen]
        if not left:
            return
        values = [*frame.f_locals.values(), result]
        for walk in left:
            if _holds(checks[walk], values):
                seen.add(walk)
                with open(log, "a", encoding="utf-8") as lines:
                    lines.write(json.dumps([walk, file, code.co_qualname]) + "\n")

    threading.setprofile(hook)
    sys.setprofile(hook)


# --- In the process that measures: the runs.


class WatchedRuns:
    """The tiny runs of a checkout, in a directory of their own."""

    def __init__(self, checkout: Path, directory: Path) -> None:
        self.checkout, self.directory = checkout, directory
        self.package = checkout / "deberta_dist"
        if not self.package.is_dir():
            raise SystemExit(f"walks.py: no package deberta_dist in {checkout}")
        site = directory / "site"
        site.mkdir()
        # Every Python that is started imports this one first.
        (site / "sitecustomize.py").write_text(
            f"import json, os, runpy\nif os.environ.get({SETTINGS!r}):\n"
            f"    runpy.run_path({str(Path(__file__).resolve())!r})['install'](json.loads(os.environ[{SETTINGS!r}]))\n",
            encoding="utf-8",
        )
        self.log = directory / "walks.log"

    def start(self, *words: object, settings: dict[str, Any] | None = None) -> str:
        """Runs a command line, watched where ``settings`` are given, and returns what it printed."""
        site = str(self.directory / "site")
        environment = os.environ | {
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([site, str(self.checkout)]),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        }
        environment.pop(SETTINGS, None)
        if settings is not None:
            environment[SETTINGS] = json.dumps({"package": str(self.package), "log": str(self.log), **settings})
        done = subprocess.run(
            [str(word) for word in words],
            cwd=self.directory,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=1200,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"walks.py: {' '.join(map(str, words))} ended with code {done.returncode}:\n{done.stdout[-4000:]}")
        return done.stdout

    def tool(self, name: str, *words: object, settings: dict[str, Any] | None = None) -> str:
        return self.start(sys.executable, self.checkout / "tools" / f"{name}.py", *words, settings=settings)

    def measure(self) -> dict[str, dict[str, str]]:
        """Walk -> file -> the first function that was seen to hold the value."""
        self._write_inputs()
        self.tool("train_tokenizer", "--input", "text.txt", "--output", "spm.model", "--vocab-size", 300)
        prepare = ("--input", "text.txt", "--held-out-input", "heldout.txt", "--tokenizer", "spm.model", "--held-out", 0)
        self.tool("prepare_corpus", *prepare, "--output", "corpus")
        self.tool("prepare_corpus", "--input", "words.txt", "--tokenizer", "spm.model", "--held-out", 0, "--output", "words")
        shown = json.loads(self.tool("inspect_corpus", "words/train", "--documents", 1, "--json"))
        ids = _first_ids(shown)[3:11]
        self.tool("prepare_corpus", *prepare, "--output", "corpus-watched", settings={"walks": ["document"], "ids": ids})
        pretrain = ("sh", "pretrain.sh", "--num_gpus", 4)
        self.start(*pretrain, "--run.directory", "first")
        weight = _query_numbers(self.directory / "first" / "weights" / "model.safetensors").hex()
        self.start(*pretrain, settings={"walks": ["batch", "weight", "config key"], "weight": weight})
        finetune = ("sh", "finetune.sh", "--num_gpus", 1, "--task", "RTE", "--data", "superglue", "--init", "run/weights")
        self.start(*finetune, "--recipe", "recipes.toml", settings={"walks": ["row"], "ids": ids})
        walks: dict[str, dict[str, str]] = {name: {} for name in ("batch", "weight", "config key", "row", "document")}
        for line in self.log.read_text(encoding="utf-8").splitlines():
            walk, file, function = json.loads(line)
            walks[walk].setdefault(file, function)
        return {name: dict(sorted(files.items())) for name, files in walks.items()}

    def _write_inputs(self) -> None:
        lines = (self.checkout / "launchers" / "demo_text" / "valid.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["text"] for line in lines[3:6]]
        # Documents of a block each; the one that is followed stands in the middle.
        (self.directory / "words.txt").write_text(f"{WORDS}\n", encoding="utf-8")
        (self.directory / "text.txt").write_text(f"{texts[0]}\n\n{WORDS}\n\n{texts[1]}\n", encoding="utf-8")
        (self.directory / "heldout.txt").write_text(f"{texts[2]}\n", encoding="utf-8")
        launchers = self.checkout / "launchers"
        shutil.copy(launchers / "pretrain_demo.sh", self.directory / "pretrain.sh")
        shutil.copy(launchers / "finetune_superglue.sh", self.directory / "finetune.sh")
        shutil.copy(launchers / "start.sh", self.directory / "start.sh")
        (self.directory / "pretrain.toml").write_text(PRETRAIN, encoding="utf-8")
        (self.directory / "finetune.toml").write_text(FINETUNE, encoding="utf-8")
        (self.directory / "recipes.toml").write_text(RECIPES, encoding="utf-8")
        (self.directory / "deepspeed.json").write_text('{"zero_optimization": {"stage": 3}}\n', encoding="utf-8")
        folder = self.directory / "superglue" / "RTE"
        folder.mkdir(parents=True)
        for split in ("train", "val", "test"):
            rows = [{"premise": WORDS, "hypothesis": "it is so .", "idx": IDX}]
            rows += [{"premise": "It is so.", "hypothesis": f"it is {i} .", "idx": i} for i in range(3)]
            for number, row in enumerate(rows):
                if split != "test":
                    row["label"] = ("entailment", "not_entailment")[number % 2]
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _first_ids(shown: Any) -> list[int]:
    """The first list of many integers in what inspect_corpus prints."""
    if isinstance(shown, list) and len(shown) > 12 and all(type(item) is int for item in shown):
        return shown
    below = shown.values() if isinstance(shown, dict) else shown if isinstance(shown, list) else ()
    return next((ids for item in below if (ids := _first_ids(item))), [])


def _query_numbers(path: Path) -> bytes:
    """Eight float32 of the first row of the first layer's query projection."""
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    name = next(name for name in sorted(header) if "layer.0." in name and name.endswith("query_proj.weight"))
    begin = 8 + int.from_bytes(content[:8], "little") + header[name]["data_offsets"][0]
    return content[begin : begin + 32]


PRETRAIN = f"""
[model]
preset = "tiny-v2"
hidden_size = 16
num_hidden_layers = 4
num_attention_heads = 2
attention_head_size = 8
intermediate_size = 40
max_position_embeddings = 32
position_buckets = 8
hidden_dropout_prob = 0.1
attention_probs_dropout_prob = 0.1
[data]
train = "corpus/train"
validation = "corpus/heldout"
tokenizer = "spm.model"
max_seq_length = {LENGTH}
[training]
global_batch_size = {2 * MICRO_BATCH}
micro_batch_size = {MICRO_BATCH}
max_steps = 2
[optimizer]
learning_rate = 1e-15
eps = {EPS!r}
[evaluation]
num_sequences = 4
[checkpoint]
every_steps = 1
[parallel]
tensor_parallel_size = 2
pipeline_parallel_size = 2
[run]
directory = "run"
deepspeed = "deepspeed.json"
"""
FINETUNE = """
[run]
directory = "answers"
deepspeed = "deepspeed.json"
"""
RECIPES = """
[default]
training.epochs = 1
training.global_batch_size = 4
training.micro_batch_size = 2
optimizer.learning_rate = 1e-3
data.max_seq_length = 64
data.window_overlap = 8
[RTE]
"""


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, default=Path(__file__).resolve().parents[1], help="default: this one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write walks, files and functions here")
    parser.add_argument("--files", action="store_true", help="list the files of every walk")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        walks = WatchedRuns(arguments.checkout.resolve(), Path(directory)).measure()
    print(f"{'walk':12} files")
    for name, files in walks.items():
        print(f"{name:12} {len(files):5}")
        if arguments.files:
            for file, function in files.items():
                print(f"    {file:45} {function}")
    if arguments.json is not None:
        counted = {name: {"count": len(files), "files": files} for name, files in walks.items()}
        arguments.json.write_text(json.dumps(counted, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
