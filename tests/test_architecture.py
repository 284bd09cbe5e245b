"""Holds the floors of the house: who may import whom, and where each heavy dependency comes in.

The rules are the tables below; ``violations`` reads a tree with ``ast`` and imports nothing. Imports
inside functions and under TYPE_CHECKING count like any other. The checker is itself tested on small
trees with one planted fault each.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "deberta_dist"

# Top to bottom; a room imports from lower floors only, never from its own floor. A name with a dot is a room within a
# room: it stands on a floor of its own, and what is not in it stands with the whole room's name.
FLOORS = (
    ("launchers", "tools", "__main__"),
    ("benchmarks", "cli"),
    ("operations",),
    ("finetuning",),
    ("training",),
    ("planning", "conversion"),
    ("training.objectives",),
    ("checkpoint", "training.step_batch"),
    ("parallel", "preparation.pipeline", "training.target_sizes"),
    ("parallel.tensor", "parallel.pipeline", "parallel.zero", "preparation.formats", "preparation.vocabulary"),
    ("parallel.mesh", "parallel.flat_layout", "preparation.filtering"),
    ("models", "tasks", "preparation.reading", "preparation"),
    ("kernels", "data"),
    ("config",),
    ("files",),
    ("errors", "values"),
)
# Lower, and still closed: the parallel rooms know modules and names, not DeBERTa; the token side and
# the model side know nothing of each other, and data knows no configuration.
CLOSED = {
    "parallel.tensor": {"models", "kernels", "tasks", "data"},
    "parallel.pipeline": {"models", "kernels", "tasks", "data"},
    "parallel.zero": {"models", "kernels", "tasks", "data"},
    "parallel.mesh": {"models", "kernels", "tasks", "data"},
    "parallel.flat_layout": {"models", "kernels", "tasks", "data"},
    "models": {"data"},
    "tasks": {"kernels"},
    **{
        f"preparation.{part}": {"config", "kernels", "models", "tasks"}
        for part in ("reading", "filtering", "vocabulary", "formats", "pipeline")
    },
    "data": {"config"},
}
PLAIN_ROOMS = ("models", "kernels", "tasks")  # nothing of torch.distributed
DOORS = {
    "deepspeed": (f"{PACKAGE}/parallel/zero/",),
    "sentencepiece": (f"{PACKAGE}/data/tokenizer.py", "benchmarks/raw_encoding.py"),
    "mpi4py": (f"{PACKAGE}/preparation/pipeline/ranks.py",),
    "filelock": (f"{PACKAGE}/files/lock.py",),
    "pyarrow": (f"{PACKAGE}/preparation/reading/parquet.py",),
    "zstandard": (f"{PACKAGE}/preparation/reading/streams.py",),
    "apex": (f"{PACKAGE}/training/optimizer.py",),
    "pydantic": (f"{PACKAGE}/config/",),
    # The file of code is not imported here: it is copied beside weights.
    "transformers": (
        f"{PACKAGE}/cli/fill_mask.py",
        "benchmarks/peers.py",
        f"{PACKAGE}/conversion/modeling_deberta_emd.py",
    ),
    "onnx": (f"{PACKAGE}/conversion/onnx_files.py",),
    "onnxscript": (f"{PACKAGE}/conversion/onnx_files.py",),
    "onnxruntime": (f"{PACKAGE}/conversion/onnx_files.py",),
    "disentangled_flash": ("benchmarks/peers.py",),
    "scipy": (),
    "rensa": (f"{PACKAGE}/preparation/filtering/near_duplicates.py",),
    "triton": (f"{PACKAGE}/kernels/fused/",),
}
# Name -> the files and folders of the package that may say it: whatever else needs such a model asks for it by the kind of
# its head (`models.heads.model_with_head`), or asks a network of the objective to make it.
NAMED_BY = {
    "DebertaForMaskedLM": (
        f"{PACKAGE}/models/",
        f"{PACKAGE}/training/objectives/masked_lm.py",
        f"{PACKAGE}/__init__.py",
        f"{PACKAGE}/conversion/modeling_deberta_emd.py",  # lies beside converted weights; this is transformers' name
    ),
}
MAX_LINES = 500
# Path -> why one file is better here than two.
LONG_FILES: dict[str, str] = {}
# Lines without the docstring.
MAX_FUNCTION_LINES = 60
# File and function -> why one function is better here than two, or that it is still to be cut.
LONG_FUNCTIONS = {
    f"{PACKAGE}/cli/prepare_corpus.py _parse_arguments": "a flag a line",
    f"{PACKAGE}/kernels/fused/kernels.py backward_kernel": "one kernel is one function",
}
MAX_PARAMETERS = 8
# File and function -> why more parameters are better here than an object that holds them.
MANY_PARAMETERS = {
    "benchmarks/": "measurements, no interface",
    f"{PACKAGE}/conversion/convert.py convert": "a keyword for each flag of the command",
    f"{PACKAGE}/conversion/modeling_deberta_emd.py forward": "the signature is transformers'",
    f"{PACKAGE}/data/masking.py mask_batch": "one caller and the golden tests, each with numbers from a different place",
    f"{PACKAGE}/kernels/attention.py disentangled_attention": "an operator: each is a tensor or a number of its formula",
    f"{PACKAGE}/kernels/fused/": "a Triton kernel takes every array, stride and constant by itself",
    f"{PACKAGE}/models/layers.py _hashed_residual_norm": "torch.compile traces it with plain tensors and numbers",
    f"{PACKAGE}/parallel/pipeline/runner.py __init__": "one caller, with plain values of configuration and model",
    f"{PACKAGE}/preparation/pipeline/prepare.py prepare_corpus": "the room's one way in: a keyword for each setting",
    f"{PACKAGE}/preparation/pipeline/spool.py write_spool_file": "a keyword for each array of the file",
}
# Classes whose names stand twice -> why.
TWICE = {"DebertaForMaskedLM": "the file that lies beside converted weights has to name its class as transformers does"}

Imports = dict[str, set[str]]


def python_files(root: Path) -> Iterator[Path]:
    """The program's files, and launchers, whose Python half is in a .sh."""
    for folder in (PACKAGE, "tools", "benchmarks"):
        yield from sorted((root / folder).rglob("*.py"))
    for launcher in sorted((root / "launchers").glob("*.sh")):
        if launcher.with_suffix(".toml").exists():
            yield launcher


def module_name(path: Path, root: Path) -> str:
    """deberta_dist/data/__init__.py -> deberta_dist.data"""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str | None:
    """Room of a module, the innermost that has a floor; None for the package itself and for what is not ours."""
    parts = module.split(".")
    if parts[0] in ("launchers", "tools", "benchmarks"):
        return parts[0]
    if parts[0] != PACKAGE or len(parts) == 1:
        return None
    within_room = ".".join(parts[1:3])
    return within_room if any(within_room in floor for floor in FLOORS) else parts[1]


def imported(path: Path, module: str) -> set[str]:
    """Full dotted names a file imports; ``from a import b`` gives ``a.b``."""
    found: set[str] = set()
    package = module.split(".") if path.stem == "__init__" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            found.update(f"{origin}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found.update(str(word.value) for word in node.args[:1] if isinstance(word, ast.Constant))
    return found


def within(name: str, module: str) -> bool:
    """Whether a dotted name is the module or lies in it."""
    return name == module or name.startswith(f"{module}.")


def violations(root: Path) -> list[str]:
    """Every broken rule of a tree, one line each."""
    files = {path: module_name(path, root) for path in python_files(root)}
    imports = {path: imported(path, module) for path, module in files.items()}
    found: list[str] = []
    for path, names in imports.items():
        here = path.relative_to(root).as_posix()
        found += _floor_violations(here, room_of(files[path]), names)
        found += [
            f"{here}: imports {dependency}; its only door is {' '.join(doors) or 'the tests'}"
            for dependency, doors in DOORS.items()
            if any(within(name, dependency) for name in names) and not here.startswith(doors or ("\0",))
        ]
        found += _names_elsewhere(here, path)
    found += _cycles({files[path]: names for path, names in imports.items()})
    return found + _long_files(root) + _long_functions(root) + _many_parameters(root) + _names_twice(root)


def _floor_violations(here: str, room: str | None, names: set[str]) -> list[str]:
    floor = {name: number for number, names_on_it in enumerate(FLOORS) for name in names_on_it}
    if room is not None and room not in floor:
        return [f"{here}: room {room} has no floor; add it to FLOORS"]
    found = []
    for other in sorted({room_of(name) for name in names} - {None, room}):
        if room is None:
            found.append(f"{here}: the package itself imports {other}; it has to stay empty")
        elif floor.get(other, -1) <= floor[room] or other in CLOSED.get(room, ()):
            found.append(f"{here}: {room} must not import {other}")
    if room in PLAIN_ROOMS and any(within(name, "torch.distributed") for name in names):
        found.append(f"{here}: {room} must not import torch.distributed")
    return found


def _names_elsewhere(here: str, path: Path) -> list[str]:
    if not here.startswith(f"{PACKAGE}/"):
        return []
    text = path.read_text(encoding="utf-8")
    return [
        f"{here}: names {name}, which is for {' '.join(doors)}"
        for name, doors in NAMED_BY.items()
        if not here.startswith(doors) and re.search(rf"\b{name}\b", text)
    ]


def _cycles(names: Imports) -> list[str]:
    graph: Imports = {}
    for module, targets in names.items():
        # the longest prefix that is a module of ours: a.b.c.function -> a.b.c
        hits = {next((name for name in prefixes(target) if name in names), "") for target in targets}
        graph[module] = hits - {"", module}
    found: list[str] = []
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        if module in trail:
            found.append(f"import cycle: {' -> '.join((*trail[trail.index(module) :], module))}")
        elif module not in done:
            for target in sorted(graph[module]):
                visit(target, (*trail, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())
    return found


def _functions(root: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """(file and name, node) of every function and method."""
    for path in python_files(root):
        if path.suffix == ".py":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield f"{path.relative_to(root).as_posix()} {node.name}", node


def _long_functions(root: Path) -> list[str]:
    found = {}
    for name, node in _functions(root):
        assert node.end_lineno is not None
        lines = node.end_lineno - node.lineno + 1
        first = node.body[0]
        if ast.get_docstring(node) is not None and first.end_lineno is not None:
            lines -= first.end_lineno - first.lineno + 1
        if lines > MAX_FUNCTION_LINES:
            found[name] = lines
    return [
        *(
            f"{name}: {lines} lines, more than {MAX_FUNCTION_LINES}"
            for name, lines in found.items()
            if name not in LONG_FUNCTIONS
        ),
        *(
            f"{name}: not as long; take it out of LONG_FUNCTIONS"
            for name in LONG_FUNCTIONS
            if root == ROOT and name not in found
        ),
    ]


def _many_parameters(root: Path) -> list[str]:
    found = {}
    for name, node in _functions(root):
        every = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        number = len([argument for argument in every if argument not in ("self", "cls", "ctx")])
        if number > MAX_PARAMETERS:
            found[name] = number
    return [
        *(
            f"{name}: {number} parameters, more than {MAX_PARAMETERS}"
            for name, number in found.items()
            if not any(covers(known, name) for known in MANY_PARAMETERS)
        ),
        *(
            f"{known}: not as many parameters; take it out of MANY_PARAMETERS"
            for known in MANY_PARAMETERS
            if root == ROOT and not any(covers(known, name) for name in found) and known != "benchmarks/"
        ),
    ]


def covers(known: str, name: str) -> bool:
    """Whether an entry of a table is this name, or a folder or class that it lies in."""
    return name == known or (known.endswith(("/", ".")) and name.startswith(known))


def _names_twice(root: Path) -> list[str]:
    where: dict[str, list[str]] = {}
    for path in python_files(root):
        if path.suffix == ".py":
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef):
                    where.setdefault(node.name, []).append(path.relative_to(root).as_posix())
    return [f"class {name} in {' and '.join(paths)}" for name, paths in where.items() if len(paths) > 1 and name not in TWICE]


def prefixes(name: str) -> Iterator[str]:
    """a.b.c -> a.b.c, a.b, a"""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _long_files(root: Path) -> list[str]:
    found = []
    for path in sorted({*python_files(root), *(root / "tests").rglob("*.py")}):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        here = path.relative_to(root).as_posix()
        if lines > MAX_LINES and here not in LONG_FILES:
            found.append(f"{here}: {lines} lines, more than {MAX_LINES}; split it, or give a reason in LONG_FILES")
        if lines <= MAX_LINES and here in LONG_FILES:
            found.append(f"{here}: {lines} lines; take it out of LONG_FILES")
    return found


def test_the_house_stands() -> None:
    assert violations(ROOT) == []


def test_the_checker_sees_the_files() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in python_files(ROOT)}
    assert {f"{PACKAGE}/errors.py", f"{PACKAGE}/config/load.py", "launchers/pretrain_demo.sh"} <= names


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("models/a.py", "import torch.distributed as dist", "models must not import torch.distributed"),
        ("kernels/a.py", "from torch import distributed", "kernels must not import torch.distributed"),
        ("tasks/a.py", "def f():\n    from torch.distributed.pipelining import x", "tasks must not import torch.distributed"),
        ("models/a.py", "from deberta_dist.training.build import x", "models must not import training"),
        ("models/a.py", "from deberta_dist import checkpoint", "models must not import checkpoint"),
        ("models/a.py", "from ..parallel.mesh import Mesh", "models must not import parallel.mesh"),
        ("parallel/tensor/a.py", "import deberta_dist.parallel.pipeline.stages", "parallel.tensor must not import parallel.pipeline"),
        ("parallel/pipeline/a.py", "from deberta_dist.parallel.zero import x", "parallel.pipeline must not import parallel.zero"),
        ("parallel/zero/a.py", "from deberta_dist.models import x", "parallel.zero must not import models"),
        ("parallel/zero/a.py", "from deberta_dist.parallel.layout import x", "parallel.zero must not import parallel"),
        ("preparation/reading/a.py", "from deberta_dist.preparation.formats import x", "must not import preparation.formats"),
        ("config/a.py", "from deberta_dist.data import x", "config must not import data"),
        ("data/a.py", "from deberta_dist.config import x", "data must not import config"),
        ("errors.py", "import deberta_dist.config", "errors must not import config"),
        ("__init__.py", "from deberta_dist.config import x", "it has to stay empty"),
        ("cellar/a.py", "", "room cellar has no floor"),
        ("training/a.py", "import deepspeed.comm", "imports deepspeed; its only door is deberta_dist/parallel/zero/"),
        ("data/a.py", "import sentencepiece", "its only door is deberta_dist/data/tokenizer.py"),
        ("training/a.py", "from mpi4py import MPI", "its only door is deberta_dist/preparation/pipeline/ranks.py"),
        ("training/a.py", 'import importlib\nimportlib.import_module("apex.optimizers")', "imports apex"),
        ("kernels/attention.py", "import triton.language as tl", "imports triton; its only door is deberta_dist/kernels/fused/"),
        ("training/a.py", "if TYPE_CHECKING:\n    import transformers", "imports transformers; its only door is deberta_dist/cli/fill_mask.py"),
        ("data/a.py", "from deberta_dist.data import b", "import cycle: deberta_dist.data.a -> deberta_dist.data.b -> deberta_dist.data.a"),
        ("conversion/a.py", "def f(model):\n    return type(model).__name__ == 'DebertaForMaskedLM'", "names DebertaForMaskedLM"),
        ("training/a.py", "import deberta_dist\n\nMODEL = deberta_dist.DebertaForMaskedLM", "names DebertaForMaskedLM"),
        ("data/a.py", "x = 1\n" * 501, "501 lines, more than 500"),
        ("data/a.py", "def f():\n" + "    x = 1\n" * 61, "a.py f: 62 lines, more than 60"),
        ("data/a.py", "def f(self, a, b, c, d, e, f, g, *, h, i):\n    pass", "a.py f: 9 parameters, more than 8"),
        ("data/a.py", "class C:\n    pass\n", "class C in deberta_dist/data/a.py and deberta_dist/data/b.py"),
    ],
)  # fmt: skip
def test_planted_fault_is_found(tmp_path: Path, file: str, text: str, expected: str) -> None:
    other = tmp_path / PACKAGE / "data" / "b.py"
    other.parent.mkdir(parents=True)
    other.write_text("from deberta_dist.data.a import x\nclass C:\n    pass\n")
    path = tmp_path / PACKAGE / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    found = violations(tmp_path)
    assert len(found) == 1
    assert expected in found[0]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("parallel/zero/a.py", "import deepspeed, torch.distributed\nfrom deberta_dist.parallel.mesh import Mesh"),
        ("models/a.py", "import torch\nfrom deberta_dist.kernels import x\nfrom .b import y\nfrom . import c"),
        ("tasks/a.py", "from deberta_dist.data.tokenizer import x\nimport deberta_dist.config"),
        ("checkpoint/a.py", "from deberta_dist.parallel.tensor import x\nfrom deberta_dist.models import y"),
        ("training/a.py", "from deberta_dist.checkpoint.save import x\nimport apexlike"),
        ("training/optimizer.py", "import apex"),
        ("kernels/fused/kernels.py", "import triton"),
        ("training/objectives/masked_lm.py", "from deberta_dist.models.masked_lm import DebertaForMaskedLM"),
        ("conversion/a.py", "NAMES = {'DebertaV2ForMaskedLM'}"),
    ],
)
def test_what_is_allowed_passes(tmp_path: Path, file: str, text: str) -> None:
    path = tmp_path / PACKAGE / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert violations(tmp_path) == []


def test_no_verb_of_the_package_needs_what_only_a_checkout_has(tmp_path: Path) -> None:
    path = tmp_path / PACKAGE / "cli" / "calibrate.py"
    path.parent.mkdir(parents=True)
    path.write_text("from benchmarks import layouts")
    assert violations(tmp_path) == ["deberta_dist/cli/calibrate.py: cli must not import benchmarks"]


def test_tools_may_not_be_imported(tmp_path: Path) -> None:
    path = tmp_path / PACKAGE / "training" / "a.py"
    path.parent.mkdir(parents=True)
    path.write_text("from tools import benchmark")
    assert violations(tmp_path) == ["deberta_dist/training/a.py: training must not import tools"]
