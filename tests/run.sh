#!/bin/sh
# Sets up .venv like the demo and runs the tests in it.
#   sh tests/run.sh                 everything but the slow ones
#   sh tests/run.sh [pytest args]   e.g. -m slow, -m gpu, or tests/config -k batch
#   sh tests/run.sh --with torch==2.11.0,triton==3.6.0 [pytest args]
#                                   the rooms that depend on them most, with other versions than the pinned ones, in an
#                                   environment of its own below .venvs (PYTHON=... chooses the interpreter)
# TEST_PYTHON=/path/to/python uses that environment as it is and installs nothing.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
if [ "${1:-}" = --with ]; then
    [ $# -ge 2 ] || { echo "run.sh: --with needs NAME==VERSION[,NAME==VERSION...]" >&2; exit 2; }
    [ -z "${TEST_PYTHON:-}" ] || { echo "run.sh: --with makes an environment, TEST_PYTHON names one; give one of them" >&2; exit 2; }
    with=$2
    shift 2
    interpreter=$("${PYTHON:-python3}" -c 'import sys; print("python-%d.%d" % sys.version_info[:2])')
    VENV="$root/.venvs/$(echo "$with" | tr ',' '_' | sed 's/==/-/g')_$interpreter"
    export VENV
    echo "run.sh: the tests run in $VENV: 3 GB on disk with PyTorch's CPU build, 6 GB with the CUDA build"
    sh launchers/setup_env.sh --with "$with" test
    python="$VENV/bin/python"
    if [ $# -eq 0 ]; then
        set -- -m "not slow" tests/kernels tests/models tests/parallel/tensor tests/parallel/pipeline tests/integration tests/pretend_device
    fi
elif [ -n "${TEST_PYTHON:-}" ]; then
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
