"""Conversion between checkpoint formats, and what tools/inspect_checkpoint.py shows of them.

All formats meet in the full, unsplit tensors under their published names. ``source`` recognises and opens a
checkpoint; ``official``, ``huggingface``, ``published`` and ``native`` each say in a table of renames and a few
structural rules how one format differs from the published names; ``convert`` drives a conversion tensor by tensor.
"""
