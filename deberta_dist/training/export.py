"""The weights of a run as one file with published names.

Each tensor slice comes from its owner; the sharding rules say how slices are joined, and vocabulary padding is removed.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from deberta_dist.checkpoint.errors import CheckpointWriteError
from deberta_dist.conversion.source import SPM_NAME
from deberta_dist.files.atomic import replace_directory, replace_file, sync_files
from deberta_dist.parallel.layout import Layout
from deberta_dist.parallel.mesh import Mesh, MeshRank
from deberta_dist.parallel.sharded_model import ShardedModel
from deberta_dist.parallel.tensor import sharding_rules
from deberta_dist.parallel.tensor.apply import join_slices
from deberta_dist.training.build import TrainingComponents
from deberta_dist.training.objectives.base import Objective, add_folds


def gather_full_weights(
    model: ShardedModel, *, layout: Layout, mesh: Mesh, owned: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Full float32 tensors by published name on rank 0; an empty dict elsewhere. Collective.

    Args:
        model: This rank's weights, not gathered.
        layout: Says which rank owns which slice.
        mesh: Slices are sent to its rank 0 from the ranks with data rank 0.
        owned: This rank's owned slices by name; None for its float32 master weights.
    """
    owned = model.store.master_weights() if owned is None else owned
    model_parallel_ranks = [(p, t) for p in range(mesh.shape.pipeline) for t in range(mesh.shape.tensor)]
    owned_by_rank = {rank: set(layout.owned(*rank)) for rank in model_parallel_ranks}
    full: dict[str, Tensor] = {}
    for name, shape in layout.full_shapes.items():
        slices = []
        for pipeline, tensor in model_parallel_ranks:
            if name not in owned_by_rank[pipeline, tensor]:
                continue
            source = mesh.shape.rank(MeshRank(pipeline=pipeline, data=0, tensor=tensor))
            if mesh.rank == source == 0:
                slices.append(owned[name].to(torch.float32).cpu())
            elif mesh.rank == source:
                # Between hosts' memories, over gloo: a GPU's memory need not hold the full tensors.
                dist.send(owned[name].to("cpu", torch.float32).contiguous(), dst=0)
            elif mesh.rank == 0:
                received = torch.empty(layout.local_shape(name), dtype=torch.float32)
                dist.recv(received, src=source)
                slices.append(received)
        if mesh.rank == 0:
            assert len(slices) == (
                1 if sharding_rules.parameter_sharding(name, layout.network.rules).dim is None else mesh.shape.tensor
            ), name
            # safetensors refuses a view that is not contiguous.
            full[name] = join_slices(slices, name, full_shape=shape, rules=layout.network.rules).contiguous()
    return full


def gather_networks(
    networks: Sequence[TrainingComponents], *, objective: Objective, mesh: Mesh
) -> dict[str, dict[str, Tensor]]:
    """Network name -> published name -> full float32 tensor as the network uses it; on rank 0 only. Collective.

    Args:
        networks: This rank's parts of every network, in the objective's order.
        objective: Its folds are added to the tables that read them.
        mesh: Tensors are sent to its rank 0.
    """
    found = {
        parts.layout.network.name: gather_full_weights(parts.sharded_model, layout=parts.layout, mesh=mesh)
        for parts in networks
    }
    add_folds(objective, found)
    return found


def keep_tokenizer(tokenizer: Path, directory: Path) -> None:
    """Copies a run's tokenizer into its directory, where conversion finds it. Atomic; for rank 0."""
    copy = directory / SPM_NAME
    if not copy.exists():
        replace_file(copy, tokenizer.read_bytes())


def write_weights(full: Mapping[str, Tensor], *, config: Mapping[str, object], tokenizer: Path, directory: Path) -> Path:
    """Writes ``config.json``, ``model.safetensors`` (float32, published names) and ``spm.model`` into a directory, atomically.

    Returns:
        ``directory``, complete and synced to disk.

    Raises:
        CheckpointWriteError: it cannot be written; no file of it remains.
    """
    temporary = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a start that was killed here: the lock excludes another run
    try:
        _write(full, config=config, tokenizer=tokenizer, temporary=temporary)
        sync_files(temporary)
        # An existing directory is from a start that ended between writing weights and result.
        replace_directory(temporary, directory, aside=directory.with_name(f".{directory.name}.old"))
    except (OSError, SafetensorError) as error:
        raise CheckpointWriteError(
            f"{directory} is not written ({error}): make room and run the same command again; it resumes from the last checkpoint"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory


def _write(full: Mapping[str, Tensor], *, config: Mapping[str, object], tokenizer: Path, temporary: Path) -> None:
    temporary.mkdir(parents=True)
    (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(tokenizer, temporary / SPM_NAME)
    save_file(dict(full), temporary / "model.safetensors", metadata={"format": "pt"})
