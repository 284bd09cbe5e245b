"""Fine-tuning on SuperGLUE: one process group, task after task, seed after seed. Start at ``finetune.py``."""
