"""Tokens to masked batches: tokenizer, token files, epoch order, masking and the loader.

Everything a training step reads is a pure function of (token files, seed, number of samples consumed), so
a run resumes, and changes its number of ranks, without any saved state of the data path.
"""
