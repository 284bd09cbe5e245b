#!/bin/sh
''':'
# Pre-trains what pretrain_1.5b.toml says. One file, two readers: a shell runs this half, which execs
# start.sh; DeepSpeed runs the file as Python on every GPU, for which this half is one string.
#   deepspeed --hostfile H launchers/pretrain_1.5b.sh [--section.key value ...]
#   sh launchers/pretrain_1.5b.sh [--hostfile H ...] [--section.key value ...] [--dry-run]
exec sh "$(dirname "$0")/start.sh" "$0" "$@"
: <<'...'
'''
import pathlib
import sys

# The launchers also run from a checkout that is not installed.
sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))

from deberta_dist.training.pretrain import main

main(__file__)
...
