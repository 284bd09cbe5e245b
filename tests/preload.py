"""Imported once by the server from which test ranks are forked."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch  # noqa: E402, F401
import torch.distributed.pipelining  # noqa: E402, F401

from deberta_dist import zero  # noqa: E402

zero.import_deepspeed()
