"""The tools, called in the tests' own process. Needs nothing but what the tool needs."""

import contextlib
import importlib.util
import io
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[1]


def call(tool: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs a tool's main in this process, which saves the seconds that importing torch takes."""
    spec = importlib.util.spec_from_file_location(tool.removesuffix(".py"), FOLDER / "tools" / tool)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    output, errors, argv, path = io.StringIO(), io.StringIO(), sys.argv, list(sys.path)
    sys.argv = [tool, *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors), contextlib.chdir(cwd):
            spec.loader.exec_module(module)
            try:
                code = module.main()
            except SystemExit as stop:
                code = int(stop.code or 0)
    finally:
        sys.argv, sys.path[:] = argv, path
    return subprocess.CompletedProcess(sys.argv, code, output.getvalue(), errors.getvalue())
