#!/bin/sh
# Sets up .venv like the demo, checks style and types, and runs the tests in it.
#   sh tests/run.sh                 all tests but the slow ones, TEST_WORKERS at once (2), and lint and types beside them
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

lint_and_types() {
    failed=0
    for words in "ruff check --quiet ." "ruff format --check --quiet ." mypy; do
        echo "run.sh: $words"
        "$python" -m $words || failed=1
    done
    return "$failed"
}

if [ "$lint" = only ]; then
    lint_and_types
    exit
fi
if [ "${1:-}" = --workers ]; then
    [ $# -ge 2 ] || { echo "run.sh: --workers needs a number" >&2; exit 2; }
    workers=$2
    shift 2
    set -- -n "$workers" --dist worksteal "$@"
fi
# Both are always run to their end: a long line hides no failing test, and no failing test a wrong type. What is found of
# style and types stands at the end, where it is read.
if [ "$lint" = yes ]; then
    found=$(mktemp)
    trap 'rm -f "$found"' EXIT
    lint_and_types >"$found" 2>&1 &
    checks=$!
fi
status=0
"$python" -m pytest "$@" || status=$?
if [ "$lint" = yes ]; then
    wait "$checks" || { [ "$status" -ne 0 ] || status=1; }
    cat "$found"
fi
exit "$status"
