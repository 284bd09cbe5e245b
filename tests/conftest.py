"""Settings of all tests."""

import os

import torch

# Small tensors: more threads cost more than they save, and the order of sums stays the same everywhere.
torch.set_num_threads(1)

if not torch.cuda.is_available():
    # Read by Triton when it is first imported, whoever does it.
    os.environ.setdefault("TRITON_INTERPRET", "1")
