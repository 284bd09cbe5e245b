#!/bin/sh
# Sets up .venv like the demo and runs the tests in it.
#   sh tests/run.sh                 everything but the slow ones
#   sh tests/run.sh [pytest args]   e.g. -m slow, or tests/config -k batch
# TEST_PYTHON=/path/to/python uses that environment as it is and installs nothing.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
if [ -n "${TEST_PYTHON:-}" ]; then
    python=$TEST_PYTHON
else
    sh launchers/setup_env.sh test
    python="$root/.venv/bin/python"
fi
# The tests that start the DeepSpeed launcher find it beside the interpreter.
PATH="$(dirname "$python"):$PATH"
export PATH
if [ $# -eq 0 ]; then
    set -- -m "not slow"
fi
exec "$python" -m pytest "$@"
