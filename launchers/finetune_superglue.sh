#!/bin/sh
''':'
# Fine-tunes on SuperGLUE; --help lists the options. One file, two readers: a shell runs this half, which execs
# start.sh; DeepSpeed runs the file as Python on every GPU, for which this half is one string.
#   deepspeed launchers/finetune_superglue.sh --task RTE --data DIR --init CHECKPOINT [--sift] [--seeds 5]
#   sh launchers/finetune_superglue.sh --task all ... [--num_gpus 8] [--section.key value] [--dry-run]
exec sh "$(dirname "$0")/start.sh" "$0" "$@"
: <<'...'
'''
import pathlib
import sys

# The launchers also run from a checkout that is not installed.
sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))

from deberta_dist.finetuning.finetune import main

main(__file__)
...
