#!/bin/sh
# Correctness and speed on one NVIDIA GPU in minutes (docs/gpu.md):
#   sh launchers/benchmark_gpu.sh [--part correctness|speed] [--step NAME] [--out DIRECTORY] [--install WHEELS]
#   sh launchers/benchmark_gpu.sh --list | --help | --rehearse | --wheels DIRECTORY [--python X.Y]
# The interpreter is .venv's where there is one, else python3; PYTHON=... is another. Paths are relative to the checkout.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3
exec "$python" -m benchmarks.gpu "$@"
