"""ZeRO-3 JSONs in the forms that public projects write them, by whose form it is. Facts, not files."""

from typing import Any

AUTO = "auto"
BATCH = {"train_batch_size": AUTO, "train_micro_batch_size_per_gpu": AUTO, "gradient_accumulation_steps": AUTO}
SCALER = {"loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2, "min_loss_scale": 1}
WINDOWS = {
    "reduce_bucket_size": AUTO,
    "stage3_prefetch_bucket_size": AUTO,
    "stage3_param_persistence_threshold": AUTO,
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
}
ADAM = {"type": "AdamW", "params": {"lr": AUTO, "betas": AUTO, "eps": AUTO, "weight_decay": AUTO}}
WARMUP = {"type": "WarmupLR", "params": {"warmup_min_lr": AUTO, "warmup_max_lr": AUTO, "warmup_num_steps": AUTO}}
HOST = {"device": "cpu", "pin_memory": True}


def zero(**keys: Any) -> dict[str, Any]:
    """The section, and what nearly everybody writes in it."""
    return {"stage": 3, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9} | keys


PUBLIC: dict[str, dict[str, Any]] = {
    "transformers, its tests' zero3": BATCH | {
        "fp16": {"enabled": AUTO, **SCALER},
        "bf16": {"enabled": AUTO},
        "optimizer": ADAM,
        "scheduler": WARMUP,
        "zero_optimization": zero(
            offload_optimizer={"device": "none", "pin_memory": True}, offload_param={"device": "none", "pin_memory": True},
            **WINDOWS, stage3_gather_16bit_weights_on_model_save=True,
        ),
        "gradient_clipping": AUTO,
        "steps_per_print": 2000,
        "wall_clock_breakdown": False,
    },
    "transformers, offload to the host": BATCH | {
        "fp16": {"enabled": AUTO, **SCALER},
        "optimizer": ADAM,
        "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": AUTO}},
        "zero_optimization": zero(
            offload_optimizer=HOST, offload_param=HOST, **WINDOWS, stage3_gather_fp16_weights_on_model_save=True
        ),
        "gradient_clipping": AUTO,
        "steps_per_print": 1e5,
        "wall_clock_breakdown": False,
    },
    "transformers, offload to nvme": BATCH | {
        "bf16": {"enabled": True},
        "zero_optimization": zero(
            offload_optimizer={"device": "nvme", "nvme_path": "/local_nvme", "pin_memory": True, "buffer_count": 4, "fast_init": False},
            offload_param={"device": "nvme", "nvme_path": "/local_nvme", "buffer_count": 5, "buffer_size": 1e8, "max_in_cpu": 1e9},
            **WINDOWS,
        ),
        "aio": {"block_size": 262144, "queue_depth": 32, "thread_count": 1, "single_submit": False, "overlap_events": True},
    },
    "accelerate, a template": BATCH | {
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 3, "stage3_gather_16bit_weights_on_model_save": False,
            "offload_optimizer": {"device": "none"}, "offload_param": {"device": "none"},
        },
        "gradient_clipping": 1.0,
        "steps_per_print": 1 << 40,
    },
    "axolotl, bf16": BATCH | {
        "zero_optimization": zero(sub_group_size=0, **WINDOWS, stage3_gather_16bit_weights_on_model_save=True),
        "bf16": {"enabled": True},
        "fp16": {"enabled": AUTO, "auto_cast": False, **SCALER},
        "gradient_clipping": AUTO,
        "wall_clock_breakdown": False,
    },
    "axolotl, all of it on the host": BATCH | {
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero(offload_optimizer=HOST, offload_param=HOST, sub_group_size=0, **WINDOWS),
        "bf16": {"enabled": True},
    },
    "LLaMA-Factory, zero3": BATCH | {
        "gradient_clipping": AUTO,
        "zero_allow_untested_optimizer": True,
        "fp16": {"enabled": AUTO, **SCALER},
        "bf16": {"enabled": AUTO},
        "zero_optimization": zero(overlap_comm=False, **WINDOWS, stage3_gather_16bit_weights_on_model_save=True),
    },
    "LLaMA-Factory, offload": BATCH | {
        "gradient_clipping": AUTO,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": AUTO},
        "zero_optimization": zero(offload_optimizer=HOST, offload_param=HOST, **WINDOWS),
    },
    "DeepSpeedExamples, chat": {
        "train_batch_size": 64, "train_micro_batch_size_per_gpu": 8, "steps_per_print": 10,
        "zero_optimization": {
            "stage": 3, "offload_param": {"device": "none"}, "offload_optimizer": {"device": "none"},
            "stage3_param_persistence_threshold": 1e4, "stage3_max_live_parameters": 3e7, "stage3_prefetch_bucket_size": 3e7,
            "memory_efficient_linear": False, "zero_hpz_partition_size": 1, "zero_quantized_weights": False,
        },
        "fp16": {"enabled": True, "loss_scale_window": 100},
        "gradient_clipping": 1.0, "prescale_gradients": False, "wall_clock_breakdown": False,
        "hybrid_engine": {"enabled": False, "max_out_tokens": 512},
        "tensorboard": {"enabled": False, "output_path": "logs/", "job_name": "step1"},
    },
    "open-instruct": BATCH | {
        "bf16": {"enabled": AUTO},
        "zero_optimization": zero(**WINDOWS, stage3_gather_16bit_weights_on_model_save=True),
        "gradient_clipping": AUTO,
        "steps_per_print": 1e5,
        "wall_clock_breakdown": False,
    },
    "FastChat": {
        "bf16": {"enabled": AUTO},
        "optimizer": ADAM,
        "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": AUTO}},
        "zero_optimization": zero(offload_optimizer=HOST, offload_param={"device": "cpu"}, **WINDOWS),
        "activation_checkpointing": {
            "partition_activations": False, "contiguous_memory_optimization": False, "cpu_checkpointing": True,
        },
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0,
    },
    "Megatron-DeepSpeed": {
        "train_batch_size": 256, "train_micro_batch_size_per_gpu": 4, "steps_per_print": 1,
        "gradient_clipping": 1.0, "prescale_gradients": False, "zero_force_ds_cpu_optimizer": True,
        "zero_optimization": {
            "stage": 3, "stage3_max_live_parameters": 3e9, "stage3_max_reuse_distance": 3e9,
            "stage3_param_persistence_threshold": 1e5, "stage3_prefetch_bucket_size": 5e7, "contiguous_gradients": True,
            "overlap_comm": True, "reduce_bucket_size": 90000000, "sub_group_size": 1e9,
            "offload_optimizer": {"device": "cpu", "buffer_count": 4, "pipeline_read": False, "pipeline_write": False},
        },
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": True},
        "wall_clock_breakdown": False,
        "data_efficiency": {"enabled": False},
        "comms_logger": {"enabled": False, "verbose": False, "prof_all": False, "debug": False, "prof_ops": ["all_reduce"]},
        "flops_profiler": {"enabled": False, "profile_step": 4, "module_depth": -1, "top_modules": 3, "detailed": True, "output_file": None},
    },
    "an old tutorial": {
        "train_batch_size": 8, "gradient_accumulation_steps": 1,
        "fp16": {"enabled": False},
        "amp": {"enabled": False},
        "zero_optimization": {"stage": 3, "cpu_offload": True, "cpu_offload_params": True, "cpu_offload_use_pin_memory": True},
        "checkpoint": {"tag_validation": "Warn"},
        "sparse_attention": None,
    },
    "of a search over sizes": BATCH | {
        "zero_optimization": zero(
            offload_optimizer=None, offload_param=None, zenflow=None, leaf_module=None, reduce_bucket_size="500000000",
            stage3_prefetch_bucket_size=0.9e7, round_robin_gradients=True, allgather_partitions=True, allgather_bucket_size=5e8,
        ),
        "bf16": {"enabled": True}, "fp16": None, "communication_data_type": None, "flops_profiler": None,
        "elasticity": {"enabled": False}, "autotuning": {"enabled": False}, "timers": {"throughput": {"enabled": True}},
        "csv_monitor": {"enabled": False, "output_path": "", "job_name": "x"}, "wandb": {"enabled": False, "group": None},
    },
}  # fmt: skip
