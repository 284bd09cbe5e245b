#!/bin/sh
''':'
# Trains the small model that pretrain_demo.toml says. One file, two readers: a shell runs this half, which execs
# start.sh; DeepSpeed runs the file as Python on every GPU, for which this half is one string.
#   deepspeed --num_gpus 8 launchers/pretrain_demo.sh [--section.key value ...]
#   sh launchers/pretrain_demo.sh [--num_gpus 8] [--section.key value ...] [--dry-run]
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
