"""Converts DeBERTa checkpoints between all published formats, and inspects them.

All forms meet in the full, unsplit tensors under their published names. ``source`` recognises and opens a checkpoint;
``official``, ``huggingface``, ``published`` and ``native`` each say in a table of renames and a few structural rules how
one form differs from the published names; ``canonical`` applies them and checks that the result is a model; ``convert``
drives a conversion tensor by tensor; ``load`` makes a model in memory.
"""
