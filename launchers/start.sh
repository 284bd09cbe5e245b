#!/bin/sh
# Starts a run from the shell: finds the environment, then execs deberta_dist.training.launch.
# Called by the launchers beside it: start.sh LAUNCHER [DeepSpeed flags] [--section.key value] [--dry-run]
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)

if ! command -v deepspeed >/dev/null 2>&1; then
    if [ -x "$root/.venv/bin/deepspeed" ]; then
        PATH="$root/.venv/bin:$PATH"
        export PATH
    else
        echo "start.sh: no 'deepspeed' on PATH and no $root/.venv; activate your environment, or run" >&2
        echo "start.sh:   sh $root/launchers/setup_env.sh" >&2
        exit 2
    fi
fi

# The interpreter that deepspeed itself belongs to; another one may lack torch.
python=$(dirname "$(command -v deepspeed)")/python
[ -x "$python" ] || python=python3

PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH
exec "$python" -m deberta_dist.training.launch "$@"
