"""Imported once by the server from which test ranks are forked."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed.pipelining  # noqa: F401

from deberta_dist.parallel import zero

zero.import_deepspeed()
