#!/bin/sh
# The whole journey with a small DeBERTa, on 8 CPU processes or the GPUs of this machine: text -> pre-training ->
# Hugging Face -> SiFT fine-tuning on SuperGLUE's tasks -> a submission.
#   sh launchers/demo.sh [--section.key value ...]
# Every step is skipped where its result exists, an interrupted pre-training continues from its last checkpoint, an
# interrupted fine-tuning with the first unfinished task; remove demo_data/, runs/pretrain_demo/ or runs/superglue_demo/ to
# do it again.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
text=launchers/demo_text
data=demo_data
run=runs/pretrain_demo
exported=$run/huggingface
tasks=launchers/demo_superglue
finetuned=runs/superglue_demo
submission=$finetuned/submission.zip

say() { echo "demo: $*"; }
phase() { echo; echo "demo: == $*"; }

say "from text to a SuperGLUE submission with a small DeBERTa, in five phases:"
say "  1 tokenizer and corpus  2 pre-training  3 Hugging Face  4 fine-tuning with SiFT  5 submission"
say "about 8 minutes on two CPU cores, most of them phases 2 and 4; a first start installs .venv before that."
say "Interrupt it at any time: the same command resumes. Finished phases are not repeated."

sh launchers/setup_env.sh huggingface
PATH="$root/.venv/bin:$PATH"
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export PATH PYTHONPATH

sentence='The Congress [MASK] the United States of America.'
pieces=4000 # and [MASK]: model.vocab_size in pretrain_demo.toml is this, rounded up
phase "1/5 tokenizer and corpus"
mkdir -p "$data"
if [ ! -f "$data/spm.model" ]; then
    say "training the tokenizer ($pieces pieces)"
    python tools/train_tokenizer.py --input "$text/train.jsonl" --output "$data/spm.model" --vocab-size "$pieces"
fi
if [ ! -f "$data/corpus/report.json" ]; then
    say "writing $data/corpus"
    python tools/prepare_corpus.py --input "$text/train.jsonl" --held-out-input "$text/valid.jsonl" --held-out 0 \
        --output "$data/corpus" --tokenizer "$data/spm.model" --workers 2
fi

gpus=0
if command -v nvidia-smi >/dev/null 2>&1; then
    gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
fi

train() {
    # processes and sizes: all three parallelisms where there is room, else fewer of them
    if [ "$gpus" -eq 0 ] || [ "$gpus" -ge 8 ]; then
        processes=8 tensor=2 pipeline=2
    elif [ "$gpus" -ge 4 ]; then
        processes=4 tensor=2 pipeline=2
    elif [ "$gpus" -ge 2 ]; then
        processes=2 tensor=2 pipeline=1
    else
        processes=1 tensor=1 pipeline=1
    fi
    say "$processes processes: tensor $tensor x pipeline $pipeline x data $((processes / tensor / pipeline))"
    # --quiet: without it DeepSpeed prints the command line of every process; errors are still shown.
    sh launchers/pretrain_demo.sh --quiet --num_gpus "$processes" --parallel.tensor_parallel_size "$tensor" \
        --parallel.pipeline_parallel_size "$pipeline" --parallel.data_parallel_size auto "$@"
}

phase "2/5 pre-training"
if [ -f "$run/result.json" ]; then
    say "already trained (remove $run to train again):"
    cat "$run/result.txt"
else
    train "$@"
fi
phase "3/5 Hugging Face"
if [ ! -d "$exported" ]; then
    say "converting the last checkpoint for Hugging Face"
    python tools/convert_checkpoint.py "$run" "$exported" --to huggingface
fi
say "$sentence"
say "  this package, with DeBERTa's enhanced mask decoder:"
python tools/fill_mask.py "$exported" "$sentence"
say "  transformers, which has no such decoder:"
python tools/fill_mask.py "$exported" "$sentence" --library transformers

phase "4/5 fine-tuning with SiFT"
if [ -f "$submission" ]; then
    say "already fine-tuned (remove $finetuned to do it again):"
    cat "$finetuned/scores.txt"
else
    processes=2
    [ "$gpus" -ne 1 ] || processes=1
    say "fine-tuning on every task of $tasks with SiFT, $processes processes (real and hand-written rows: see SOURCES.md)"
    sh launchers/finetune_superglue.sh --quiet --num_gpus "$processes" --task all --sift --data "$tasks" \
        --init "$exported" --out "$finetuned"
fi

phase "5/5 submission"
if [ ! -f "$submission" ]; then
    say "writing the ten files"
    made=$(python tools/make_submission.py --predictions "$finetuned" --data "$tasks" --out "$submission" 2>&1) || {
        echo "$made"
        exit 1
    }
    echo "$made" | tail -n 1
    warnings=$(echo "$made" | grep -c '^warning: ' || true)
    say "$warnings warnings, as small splits bring them, are listed in ${submission%.zip}.manifest.json"
fi
verdict=$(python tools/make_submission.py --validate "$submission" --data "$tasks" 2>&1) || {
    echo "$verdict"
    exit 1
}
say "$(echo "$verdict" | tail -n 1)"

phase "what is there now"
say "  $data/: tokenizer and corpus, with reports"
say "  $run/: metrics.jsonl, checkpoints/, weights/, result.txt"
say "  $exported/: the model for transformers"
say "  $finetuned/: predictions and scores of every task, and $(basename "$submission")"
say "next: a model and text of your own (docs/pretraining.md), other checkpoints (docs/conversion.md), fine-tuning on the"
say "  official data (docs/finetuning.md). Remove the directories above to start over."
