"""Imported once by the server from which test ranks are forked, so that no rank pays for an import."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import atexit
import gc
import importlib

import torch
import torch.distributed.pipelining  # noqa: F401

from deberta_dist.parallel import zero

zero.import_deepspeed()

# What DeepSpeed and torch import when an engine is made and the first step runs. Muon's file alone, which every engine
# looks at, compiles functions where they are defined and so imports all of torch's compiler: 2 s of 3 that a rank took.
LATE_IMPORTS = (
    "deepspeed.module_inject.auto_ep_config",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch._subclasses.schema_check_mode",
)
for name in LATE_IMPORTS:
    importlib.import_module(name)

# What the functions of the ranks live on.
for name in ("checkpoint", "finetuning.finetune", "planning.dry_run", "training.pretrain", "training.trainer"):
    importlib.import_module(f"deberta_dist.{name}")

# A rank's collections leave alone what was here before it, which DeepSpeed asks for when an engine is made.
gc.collect()
gc.freeze()
atexit.register(gc.unfreeze)
