"""Checkpoints that know no layout: written in shards by every rank, read as slices of named tensors by any other."""
