"""Holds that nothing of the package is left over: no small file beside its only user, nothing that tests alone use, no legal
value spelled twice. Reads the tree as ``test_architecture`` does, and imports nothing of it.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.test_architecture import PACKAGE, ROOT, covers, imported, module_name, prefixes, python_files

# A file of fewer lines with one importer belongs to that importer.
SMALL_FILE_LINES = 60
# File or folder -> why it stands alone.
SMALL_FILES = {
    f"{PACKAGE}/cli/": "a verb a file, which is found by its name",
    f"{PACKAGE}/tasks/superglue/benchmark.py": "a benchmark's folder has the benchmark in a file of this name",
    f"{PACKAGE}/tasks/superglue/copa.py": "a task a file: no task's name stands outside its own",
    f"{PACKAGE}/tasks/superglue/wic.py": "a task a file: no task's name stands outside its own",
    f"{PACKAGE}/kernels/reference.py": "the formula by itself, with which every other implementation is compared",
    f"{PACKAGE}/models/number_formats.py": "the wording of one error, kept out of the mathematics",
}
# What the program defines and nothing in it names -> who does.
NAMED_ELSEWHERE = {
    f"{PACKAGE}/__init__.py __getattr__": "Python, for attributes that are found on demand",
    f"{PACKAGE}/conversion/torch_files.py _Pickler.persistent_id": "pickle",
    f"{PACKAGE}/parallel/zero/flat_module.py ModelParallelUnit.": "DeepSpeed, which takes it for Megatron's `mpu`",
    f"{PACKAGE}/parallel/zero/weight_store.py WeightStore.resident_bytes": "tests of every layout, which count what a rank holds",
}


def small_files(root: Path) -> list[str]:
    """Small files of the package with one importer, or none, as ``path: lines, importer``."""
    modules = {path: module_name(path, root) for path in python_files(root)}
    importers: dict[str, set[str]] = {module: set() for module in modules.values()}
    for path, module in modules.items():
        for name in imported(path, module):
            hit = next((prefix for prefix in prefixes(name) if prefix in importers), module)
            if hit != module:
                importers[hit].add(path.relative_to(root).as_posix())
    found = []
    for path, module in modules.items():
        here = path.relative_to(root).as_posix()
        lines = len(path.read_text(encoding="utf-8").splitlines())
        is_door = path.name in ("__init__.py", "__main__.py") or not here.startswith(f"{PACKAGE}/")
        if lines < SMALL_FILE_LINES and len(importers[module]) <= 1 and not is_door:
            found.append(f"{here}: {lines} lines, imported by {''.join(importers[module]) or 'nothing'}")
    return found


def unnamed(root: Path) -> list[str]:
    """Functions, classes, constants and methods of the package that no code of the program names, as ``path name``.

    A name counts wherever it is read, imported, an attribute or a string of its own; a definition does not name itself.
    Methods that a decorator registers and those of Python's own protocols are called by others.
    """
    defined: list[tuple[str, str]] = []
    named: set[str] = set()
    for path in python_files(root):
        for top in ast.parse(path.read_text(encoding="utf-8")).body:
            if module_name(path, root).split(".")[0] == PACKAGE:
                defined += [(path.relative_to(root).as_posix(), name) for name in _definitions(top)]
            own = getattr(top, "name", None)
            named.update(name for node in ast.walk(top) for name in _names_in(node) if name != own)
    return [f"{path} {name}" for path, name in defined if name.split(".")[-1] not in named]


def _definitions(top: ast.stmt) -> Iterator[str]:
    match top:
        case ast.FunctionDef(name=name):
            yield name
        case ast.ClassDef(name=name, body=body):
            yield name
            for inner in body:
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("__"):
                    decorators = " ".join(ast.unparse(decorator) for decorator in inner.decorator_list)
                    if "validator" not in decorators and "override" not in decorators:
                        yield f"{name}.{inner.name}"
        case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)) if name != "__all__":
            yield name


def _names_in(node: ast.AST) -> list[str]:
    match node:
        case ast.Name(id=name, ctx=ast.Load()) | ast.Attribute(attr=name):
            return [name]
        case ast.ImportFrom(names=names):
            return [alias.name for alias in names]
        case ast.Constant(value=str(text)):
            return [text]
    return []


def respelled(root: Path) -> list[str]:
    """Lists, tuples, sets and `Literal`s in which all values of a key of ``values.py`` stand once more."""
    tree = ast.parse((root / PACKAGE / "values.py").read_text(encoding="utf-8"))
    legal = {}
    for top in tree.body:
        if isinstance(top, ast.Assign) and ast.unparse(top.value).startswith("Literal["):
            values = {node.value for node in ast.walk(top.value) if isinstance(node, ast.Constant)}
            # "auto" and "none" may be told apart from the others; a single value is no set.
            if len(values - {"auto", "none"}) > 1:
                legal[ast.unparse(top.targets[0])] = values - {"auto", "none"}
    assert len(legal) >= 10, "not read as meant"
    found = []
    for path in python_files(root):
        if path.name == "values.py" or path.relative_to(root).parts[0] == "benchmarks":  # which name what they measure
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.List | ast.Tuple | ast.Set):
                here = {inner.value for inner in node.elts if isinstance(inner, ast.Constant)}
                found += [
                    f"{path.relative_to(root).as_posix()}:{node.lineno}: the values of {name}: take them from values.py"
                    for name, values in legal.items()
                    if values <= here
                ]
    return found


def test_small_files_belong_to_their_importers() -> None:
    found = small_files(ROOT)
    assert [line for line in found if not any(covers(known, line.split(":")[0]) for known in SMALL_FILES)] == []
    names = [line.split(":")[0] for line in found]
    assert [known for known in SMALL_FILES if not any(covers(known, name) for name in names)] == [], "take them out"


def test_what_only_tests_use_is_not_in_the_package() -> None:
    found = unnamed(ROOT)
    assert [name for name in found if not any(covers(known, name) for known in NAMED_ELSEWHERE)] == []
    assert [known for known in NAMED_ELSEWHERE if not any(covers(known, name) for name in found)] == [], "take them out"


def test_legal_values_are_defined_once() -> None:
    assert respelled(ROOT) == []


def test_planted_small_and_unnamed_are_found(tmp_path: Path) -> None:
    (tmp_path / PACKAGE).mkdir()
    (tmp_path / PACKAGE / "values.py").write_text((ROOT / PACKAGE / "values.py").read_text(encoding="utf-8"))
    files = {
        "a.py": "def used():\n    return 1\ndef alone():\n    return alone()\nclass C:\n    def method(self): ...\n",
        "b.py": f"from {PACKAGE}.a import C, used\nB = C()\n" + "used(B)\n" * SMALL_FILE_LINES,
        "c.py": f"from {PACKAGE}.b import B\n" + "print(B)\n" * SMALL_FILE_LINES,
        "d.py": f'import {PACKAGE}.c\nKINDS = ("span", "token", "choice", "sequence")\nprint(KINDS, {PACKAGE}.c)\n' * 30,
    }
    for name, text in files.items():
        (tmp_path / PACKAGE / name).write_text(text)
    own = f"{PACKAGE}/values.py"
    assert [line for line in small_files(tmp_path) if own not in line] == [
        f"{PACKAGE}/a.py: 6 lines, imported by {PACKAGE}/b.py",
    ]
    assert [name for name in unnamed(tmp_path) if own not in name] == [f"{PACKAGE}/a.py alone", f"{PACKAGE}/a.py C.method"]
    assert f"{PACKAGE}/d.py:2: the values of HeadKind: take them from values.py" in respelled(tmp_path)
