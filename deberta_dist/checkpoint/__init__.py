"""Layout-independent checkpoints: every rank writes its shards, and any layout reads them as slices of named tensors."""
