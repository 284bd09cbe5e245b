#!/bin/sh
# Sets up .venv like the demo, checks style and types, and runs the tests in it.
#   sh tests/run.sh                 lint, types, and all tests but the slow ones: TEST_WORKERS at once (2), then the serial ones
#   sh tests/run.sh [pytest args]   tests alone, one at a time: tests/config -k batch, or -m gpu. Slow ones stay out
#                                   unless -m asks for them (-m slow, -m "")
#   sh tests/run.sh --workers 4 [pytest args]
#                                   the same by several workers
#   sh tests/run.sh --lint          lint and types alone
#   sh tests/run.sh --with torch==2.11.0,triton==3.6.0 [pytest args]
#                                   the rooms that depend on them most, with other versions than the pinned ones, in an
#                                   environment of its own below .venvs (PYTHON=... chooses the interpreter)
# TEST_PYTHON=/path/to/python uses that environment as it is and installs nothing.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
lint=no
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
        set -- tests/kernels tests/models tests/parallel/tensor tests/parallel/pipeline tests/integration tests/pretend_device
    fi
else
    if [ -n "${TEST_PYTHON:-}" ]; then
        python=$TEST_PYTHON
    else
        sh launchers/setup_env.sh test
        python="$root/.venv/bin/python"
    fi
    if [ $# -eq 0 ]; then
        lint=yes
        set -- --workers "${TEST_WORKERS:-2}"
    elif [ "$*" = --lint ]; then
        lint=only
    fi
fi
# The tests that start the DeepSpeed launcher find it beside the interpreter.
PATH="$(dirname "$python"):$PATH"
export PATH
# Every worker and every process that a test starts would compile the same files again.
unset PYTHONDONTWRITEBYTECODE

# All are run and the first failure decides: a long line hides no failing test.
status=0
check() {
    echo "run.sh: $*"
    "$python" -m "$@" || status=1
}
if [ "$lint" != no ]; then
    check ruff check --quiet .
    check ruff format --check --quiet .
    check mypy
fi
if [ "$lint" != only ]; then
    "$python" tests/two_parts.py "$@" || { code=$?; [ "$status" -ne 0 ] || status=$code; }
fi
exit "$status"
