#!/usr/bin/env bash
# Measures on one NVIDIA GPU what README's performance page has targets for: attention, whole layers, steps, memory.
#
#   bash launchers/benchmark_gpu.sh [--official CHECKOUT] [--out DIRECTORY]
#
# Each measurement compares results before it times them, prints a table and leaves a JSON in DIRECTORY
# (runs/benchmark_gpu). One that fails is told at the end and does not stop the others. An H100 takes some minutes.
set -u
cd "$(dirname "$0")/.."

out=runs/benchmark_gpu
official=
while [ $# -gt 0 ]; do
    case "$1" in
        --official) official=$2; shift 2 ;;
        --out) out=$2; shift 2 ;;
        *) echo "benchmark_gpu.sh: $1 is no option; there are --official CHECKOUT and --out DIRECTORY" >&2; exit 2 ;;
    esac
done
[ -z "$official" ] || set -- --official "$official"
python=.venv/bin/python
[ -x "$python" ] || python=python3
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "benchmark_gpu.sh: torch sees no GPU here; tools/benchmark.py measures on a CPU" >&2
    exit 2
fi
mkdir -p "$out"
failed=

measure() { # NAME ARGUMENTS of tools/benchmark.py
    name=$1
    shift
    echo "== $name: tools/benchmark.py $*"
    "$python" tools/benchmark.py "$@" --json "$out/$name.json" || failed="$failed $name"
}

for length in 512 1024 4096; do
    measure "attention-$length" layer --heads 24 --batch-size $((8192 / length)) --length "$length" --rounds 15 "$@"
done
measure whole-layer layer --part whole --heads 24 --batch-size 8 --length 512 --rounds 15 "$@"
measure step-4 step --layers 4 --batch-size 16 --rounds 10 "$@"
measure step-12 step --layers 12 --batch-size 16 --rounds 10 "$@"
measure head head --hidden-size 1536 --batch-size 8 --rounds 10
measure memory memory
model="train --preset v2-xxlarge --processes 1 --length 512 --rounds 5"
measure 1.5b $model --micro-batch-size 16 --micro-batches 2 --contestants ours
measure 1.5b-compiled $model --micro-batch-size 16 --micro-batches 2 --contestants ours --compile
# Two models with their moments lie side by side here: smaller micro-batches.
measure 1.5b-peer $model --micro-batch-size 4 --micro-batches 8 --contestants ours,huggingface
if [ -n "$failed" ]; then
    echo "benchmark_gpu.sh: failed:$failed" >&2
    exit 1
fi
