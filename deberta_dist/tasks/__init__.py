"""What fine-tuning answers: tasks and benchmarks behind one seam (`base.py`), their predictions, scores and reports.

``superglue/`` and ``glue/`` are tasks; the rest is for all of them. Nothing here needs torch.
"""
