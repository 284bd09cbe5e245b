"""Configuration: what is trained (TOML), how DeepSpeed runs it (JSON), and one check of both.

The story for a user::

    launchers/pretrain_1.5b.toml    WHAT: [model] [data] [training] [optimizer] [schedule]
                                    [evaluation] [checkpoint] [parallel] [run]
    ds_configs/zero3_bf16.json      HOW: precision, offload, buckets, monitors
    --section.key value             overrides of the TOML, for one start

Fine-tuning has a TOML of its own kind (``finetune.py``), over which a task's recipe
(``launchers/finetune_recipes/``) is laid before the overrides.

``schema.py`` (and ``data.py`` for ``[data]``) is the reference: every key with its unit and default. The rules:

* Unknown keys, wrong types, NaN, duplicates are errors. One message lists all of them, each with its
  file (or "command line"), its key and the nearest key that exists. Exit code 2, before any device is
  touched.
* ``--section.key value`` or ``--section.key=value``. The value is TOML (``1e-4``, ``true``,
  ``[6, 6]``), or plain text (``v2-xxlarge``, ``auto``). Each key at most once. In a table of tables:
  ``--data.sources.wiki.proportion 0.3``.
* A relative path in a TOML is relative to the folder of that TOML, so a launcher works from any
  current directory. A relative path on the command line is relative to the current directory, as the
  shell completes it. ``~`` is expanded in both.
* [model] takes a ``preset`` or a published ``config.json``, and any field of it as an override
  (``num_hidden_layers = 4``). The models room knows these fields and checks them.
* A number that follows from others stands as ``"auto"`` (or is left out). Given numbers are checked::

      processes         = tensor_parallel_size x pipeline_parallel_size x data_parallel_size
      global_batch_size = micro_batch_size x num_micro_batches x data_parallel_size

  With data_parallel_size and num_micro_batches "auto" the same TOML runs on any number of GPUs that
  divides well, with the same global batch, hence the same training.
* The JSON holds no optimizer, no schedule and no batch sizes: those are the TOML's. Its
  ``gradient_clipping`` is "auto" or equal to the TOML's. ``train_batch_size``,
  ``train_micro_batch_size_per_gpu`` and ``gradient_accumulation_steps`` are "auto" or absent: inside
  DeepSpeed they do not count sequences (see ``deepspeed_json.py``). ZeRO stage 3 always. Elsewhere in the JSON ``null``
  means absent and "auto" DeepSpeed's default; the planner has all of it checked by DeepSpeed's own classes.
* Every run directory gets ``run_config.toml`` and ``deepspeed.json`` with everything filled in. The
  pair loads again: with another number of processes, add
  ``--parallel.data_parallel_size auto --training.num_micro_batches auto``.

The story for the program, in this order::

    config = resolve(load_config("run.toml", overrides), world_size)
    ds = read_deepspeed(config.run.deepspeed, config, examine=...).values
    precision(ds)                                   # "fp32", "bf16" or "fp16"
    write_resolved(config, ds, config.run.directory)

Imports nothing but ``errors`` (no torch, no DeepSpeed): a wrong number is said within a second.
"""

from deberta_dist.config.data import Data
from deberta_dist.config.deepspeed_json import deepspeed_config, offload_device, precision, read_deepspeed
from deberta_dist.config.finetune import FineTuneConfig
from deberta_dist.config.load import load_config
from deberta_dist.config.recipes import TaskRecipe, read_recipes
from deberta_dist.config.resolve import resolve, resolve_finetuning, smallest_world_size
from deberta_dist.config.schema import (
    Checkpoint,
    Evaluation,
    Model,
    Optimizer,
    Parallel,
    Run,
    RunConfig,
    Schedule,
    Training,
    default_values,
)
from deberta_dist.config.section import Section
from deberta_dist.config.write import write_resolved

__all__ = [
    "Checkpoint",
    "Data",
    "Evaluation",
    "FineTuneConfig",
    "Model",
    "Optimizer",
    "Parallel",
    "Run",
    "RunConfig",
    "Schedule",
    "Section",
    "TaskRecipe",
    "Training",
    "deepspeed_config",
    "default_values",
    "load_config",
    "offload_device",
    "precision",
    "read_deepspeed",
    "read_recipes",
    "resolve",
    "resolve_finetuning",
    "smallest_world_size",
    "write_resolved",
]
