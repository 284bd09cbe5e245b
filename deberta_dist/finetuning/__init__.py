"""Fine-tuning on a benchmark: one process group, task after task, seed after seed. Start at ``finetune.py``."""
