"""Settings of all tests."""

import torch

# Small tensors: more threads cost more than they save, and the order of sums stays the same everywhere.
torch.set_num_threads(1)
