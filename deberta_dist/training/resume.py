"""The checkpoint that a run resumes from: found by one rank before any process group exists; then each rank reads its shards."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deberta_dist.checkpoint.compatible import compatible, same_tensors
from deberta_dist.checkpoint.find import CHECKPOINTS_NAME, checkpoints, newest_complete, step_name
from deberta_dist.checkpoint.manifest import Manifest
from deberta_dist.checkpoint.publish import is_being_replaced, sweep
from deberta_dist.checkpoint.reader import CheckpointReader
from deberta_dist.config import default_values, precision
from deberta_dist.errors import ConfigError
from deberta_dist.files.lock import RunLock
from deberta_dist.parallel.flat_layout import ShardState
from deberta_dist.parallel.layout import Layout
from deberta_dist.parallel.mesh import Mesh
from deberta_dist.parallel.sharded_model import ShardedModel
from deberta_dist.planning.plan import Plan
from deberta_dist.planning.reading import UNNAMED
from deberta_dist.training.build import own_flat_layout
from deberta_dist.training.inputs import RunData
from deberta_dist.training.length import RESULT_NAME, continue_finished, refuse_finished
from deberta_dist.training.metrics import METRICS_NAME

# Keys that decide which samples a text has, and their order.
_ORDER_KEYS = ("training.seed", "data.max_seq_length", "data.document_boundaries", "data.bucket_lengths")


@dataclass(frozen=True)
class ResumePoint:
    """What a run directory holds.

    Attributes:
        reader: The newest complete checkpoint; None if the run starts from the beginning.
        damaged: Newer checkpoints that are incomplete or fail their checksums.
    """

    reader: CheckpointReader | None
    damaged: frozenset[Path] = frozenset()


def checkpoint_directory(plan: Plan) -> Path:
    """The directory of a run's checkpoints."""
    return Path(plan.config.run.directory) / CHECKPOINTS_NAME


def is_interrupted(plan: Plan) -> bool:
    """Whether the run directory holds checkpoints that the run has to resume from. Any rank may call it."""
    directory = checkpoint_directory(plan)
    return plan.config.checkpoint.resume != "never" and (bool(checkpoints(directory)) or is_being_replaced(directory))


def find_checkpoint(plan: Plan, *, data: RunData, lock: RunLock) -> ResumePoint:
    """The checkpoint that the run resumes from, by ``checkpoint.resume``. For rank 0, before any process group exists.

    Raises:
        ConfigError: the directory holds a finished run, or a run that must not or cannot be resumed, or the checkpoint
            belongs to another model, tokenizer or set of sources.
        CheckpointError: there are checkpoints, and none is complete.
    """
    run, directory, resume = Path(plan.config.run.directory), checkpoint_directory(plan), plan.config.checkpoint.resume
    finished_steps = refuse_finished(plan)
    sweep(directory, lock=lock, on_remove=_warn)
    refuse_to_begin(plan)
    if resume == "never":
        return ResumePoint(None)
    damaged: list[Path] = []
    reader = newest_complete(directory, on_skip=_warn, on_damaged=damaged.append)
    check_checkpoint(reader, plan=plan, tokenizer_sha256=data.tokenizer.sha256, data=data)
    if reader is not None and finished_steps is not None:
        continue_finished(run, steps=finished_steps)
    return ResumePoint(reader, frozenset(damaged))


def refuse_to_begin(plan: Plan) -> None:
    """Refuses a run directory with a run in it if ``checkpoint.resume`` is "never".

    Raises:
        ConfigError: the directory has metrics or checkpoints.
    """
    run = Path(plan.config.run.directory)
    if plan.config.checkpoint.resume == "never" and ((run / METRICS_NAME).exists() or checkpoints(checkpoint_directory(plan))):
        raise ConfigError(
            f"run.directory = {run} already holds a run (it has metrics or checkpoints) and "
            'checkpoint.resume is "never": move it away or give another --run.directory'
        )


def check_checkpoint(
    reader: CheckpointReader | None, *, plan: Plan, tokenizer_sha256: str | None, data: RunData | None
) -> None:
    """Refuses a checkpoint that the run cannot resume from. The dry run calls it too, with the files that exist by then.

    Args:
        reader: The newest checkpoint, or None.
        plan: The checked run that is about to start.
        tokenizer_sha256: SHA-256 of ``data.tokenizer``; None if the file does not exist yet.
        data: Opened texts; None if some do not exist yet.

    Raises:
        ConfigError: the run has to resume and there is no checkpoint; or it belongs to another model, tokenizer or blend, or
            has more steps than the run.
        CheckpointError: its tensors are not those of its configuration.
    """
    run, directory = Path(plan.config.run.directory), checkpoint_directory(plan)
    if reader is None:
        if (run / RESULT_NAME).exists():
            raise ConfigError(
                f"run.directory = {run} holds a finished run (it has {RESULT_NAME}) and no checkpoint to continue it from: "
                "move it away or give another --run.directory"
            )
        if plan.config.checkpoint.resume == "required":
            raise ConfigError(f'checkpoint.resume = "required", and there is no checkpoint in {directory}')
        return
    compatible(
        reader.manifest,
        model_config=plan.model_config.to_dict(),
        tokenizer_sha256=tokenizer_sha256 or reader.manifest.tokenizer_sha256,
        networks={network.name: network.config.to_dict() for network in plan.objective.networks if network.name},
    )
    same_tensors(reader.manifest, plan.full_shapes, where=reader.directory)
    if data is not None:
        _same_sources(reader, plan=plan, data=data)
    if reader.manifest.step > plan.config.training.max_steps:
        raise ConfigError(
            f"training.max_steps = {plan.config.training.max_steps} is less than the {reader.manifest.step} steps of "
            f"{reader.directory}: give at least as many, or another --run.directory"
        )


def _same_sources(reader: CheckpointReader, *, plan: Plan, data: RunData) -> None:
    """Refuses to resume a blend with other sources, proportions or sequence lengths.

    They decide, with the number of consumed samples, how far each source has been read; with others, some samples would be
    read twice and some never. A run of one corpus may resume with another text; the log says so (``changed_settings``).

    Raises:
        ConfigError: lists every difference.
    """
    there, here = reader.manifest.run_config["data"], plan.config.data.model_dump(mode="json")
    old, new = there.get("sources", {}), here["sources"]
    if not old and not new:
        return
    found = [
        f"data.{key} = {here[key]}, {there.get(key)} there"
        for key in ("max_seq_length", "document_boundaries", "bucket_lengths")
        if here[key] != there.get(key)
    ]
    old_texts, new_texts = reader.manifest.data_sha256, data.checksums()
    for name in sorted(old.keys() | new.keys()):
        if name not in old or name not in new:
            found.append(f"data.sources.{name} is {'new' if name in new else 'missing'}")
            continue
        found += [
            f"data.sources.{name}.{key} = {new[name][key]}, {old[name][key]} there"
            for key in ("proportion", "epochs")
            if new[name][key] != old[name][key]
        ]
        if old_texts.get(f"sources.{name}") != new_texts[f"sources.{name}"]:
            found.append(f"data.sources.{name} is another text")
    if found:
        raise ConfigError(
            f"{reader.directory} belongs to a run with other sources: {'; '.join(found)}. The position in each follows from "
            "all of them: resume with the same, or start a new run from its weights (training.init and another run.directory)"
        )


def share_checkpoint(reader: CheckpointReader | None, *, plan: Plan, mesh: Mesh) -> CheckpointReader | None:
    """Rank 0's checkpoint, opened on every rank. Collective."""
    # -1 for none: ranks exchange numbers only, never pickled objects.
    step = mesh.broadcast_number(-1 if reader is None else reader.manifest.step)
    if step < 0 or reader is not None:
        return reader
    return CheckpointReader(checkpoint_directory(plan) / step_name(step))


def read_shards(reader: CheckpointReader, *, layout: Layout, mesh: Mesh) -> list[ShardState]:
    """This rank's shard of every flat parameter of a network, and nothing else, from a checkpoint of any layout."""
    network = layout.network
    return reader.read_shards(
        own_flat_layout(layout, mesh=mesh),
        shape=mesh.shape,
        mesh_rank=mesh.mesh_rank,
        rules=network.rules,
        saved_name=network.saved_name,
    )


def load_state(model: ShardedModel, shards: Sequence[ShardState], *, manifest: Manifest, network: str = "") -> None:
    """Restores moments, step count and loss scale; the weights were set from ``shards`` when the model was built.

    Args:
        model: A newly built model, before its first step.
        shards: From `read_shards` of the same checkpoint and network.
        manifest: The checkpoint's, which has step count and loss scale.
        network: The network's name; "" for the one whose weights are published.
    """
    store, state = model.store, manifest.networks[network] if network else manifest
    store.load_moments(shards, optimizer_steps=state.optimizer_steps)
    store.load_loss_scale_state(state.loss_scale)


def changed_settings(plan: Plan, data: RunData, *, manifest: Manifest) -> list[str]:
    """What differs between the run that wrote a checkpoint and this one: ``section.key: old -> new``."""
    new = _flat(plan.config.model_dump(mode="json"))
    # A key that did not exist when the checkpoint was written had its default.
    old = {**default_values(), **_flat(manifest.run_config)}
    # Not paths: the texts are compared by checksum. Nor model.vocab_size, which may be given or derived; the model is compared.
    ignored = ("run.", "data.train", "data.validation", "data.tokenizer", "data.sources", "data.index_directory")
    changed = [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(ignored) and key != "model.vocab_size"
    ]
    if any(old.get(key) != new.get(key) for key in _ORDER_KEYS):
        changed.append(
            "order of the samples: changed; the same number is skipped, so some samples of this epoch may be read twice and "
            "others not at all"
        )
    elif new["data.bucket_lengths"] and old["training.global_batch_size"] != new["training.global_batch_size"]:
        changed.append(
            "order of the buckets: changed; the same number of tokens is skipped, so sequences of a few steps may be read twice "
            "or not at all"
        )
    if manifest.precision != precision(plan.deepspeed):
        changed.append(f"precision: {manifest.precision} -> {precision(plan.deepspeed)}")
    old_texts, new_texts = manifest.data_sha256, data.checksums()
    if old_texts.get(UNNAMED) != new_texts.get(UNNAMED):
        changed.append("data.train: another text; as many of its samples are skipped as were consumed")
    if old_texts.get("validation") not in (None, new_texts["validation"]):  # older checkpoints do not say
        changed.append("data.validation: another text; held-out losses before and after this cannot be compared")
    return changed


def _warn(message: str) -> None:
    print(f"warning: {message}", flush=True)


def _flat(tables: Mapping[str, Any]) -> dict[str, Any]:
    return {
        f"{section}.{key}": value
        for section, table in tables.items()
        if isinstance(table, Mapping)
        for key, value in table.items()
    }
