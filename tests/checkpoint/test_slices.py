"""The table of a whole layout, and the small layouts that all tests of checkpoints write and read."""

import dataclasses
import functools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deberta_dist.checkpoint.errors import CheckpointError
from deberta_dist.checkpoint.manifest import FileEntry, Manifest, TensorEntry, WrittenLayout
from deberta_dist.checkpoint.reader import CheckpointReader
from deberta_dist.checkpoint.shard_file import STATES
from deberta_dist.checkpoint.slices import check_table, local_cut, shard_slices, tensor_table
from deberta_dist.checkpoint.writer import CheckpointWriter
from deberta_dist.config import Parallel
from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.flops import forward_flops
from deberta_dist.parallel.flat_layout import FlatLayout, ShardState, lay_out
from deberta_dist.parallel.layout import Layout, plan_layout
from deberta_dist.parallel.mesh import MeshShape
from deberta_dist.parallel.network import is_decayed, is_not_decayed
from deberta_dist.parallel.tensor import sharding_rules
from deberta_dist.parallel.tensor.apply import cut_tensor
from deberta_dist.training.objectives.masked_lm import MaskedLMNetwork

TOKENIZER = "ab" * 32
Known = dict[str, dict[str, Tensor]]


def model_config(model: str) -> DebertaConfig:
    """A small v1 or v2; 203 tokens divide by nothing."""
    fields = {
        "vocab_size": 203,
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 24,
        "max_position_embeddings": 32,
        "relative_attention": True,
        "position_biased_input": False,
        "pos_att_type": "p2c|c2p",
    }
    if model == "v2":
        fields |= {"position_buckets": 8, "share_att_key": True, "norm_rel_ebd": "layer_norm", "conv_kernel_size": 3}
    return DebertaConfig.from_dict(fields)


@dataclass(frozen=True)
class Case:
    """One layout of one model."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    model: str = "v2"
    stages_per_rank: int = 1

    @property
    def shape(self) -> MeshShape:
        return MeshShape(pipeline=self.pipeline, data=self.data, tensor=self.tensor)

    @functools.cached_property
    def layout(self) -> Layout:
        config = model_config(self.model)
        flops = forward_flops(config, max_seq_length=16, micro_batch_size=2, mask_probability=0.15)
        parallel = Parallel(
            tensor_parallel_size=self.tensor,
            pipeline_parallel_size=self.pipeline,
            data_parallel_size=self.data,
            schedule="1f1b" if self.stages_per_rank == 1 else "interleaved_1f1b",
            stages_per_rank=self.stages_per_rank,
        )
        return plan_layout(MaskedLMNetwork(config=config), parallel=parallel, flops=flops)

    def flat_layout(self, pipeline: int, tensor: int) -> FlatLayout:
        shapes = {name: self.layout.local_shape(name) for name in self.layout.owned(pipeline, tensor)}
        return lay_out(shapes, groups=(is_decayed, is_not_decayed), data_parallel_size=self.data)

    @functools.cached_property
    def table(self) -> dict[str, TensorEntry]:
        places = {(p, t): self.flat_layout(p, t) for p in range(self.pipeline) for t in range(self.tensor)}
        return tensor_table(places, shape=self.shape, full_shapes=self.layout.full_shapes)

    def manifest(self, step: int = 100) -> Manifest:
        return Manifest(
            step=step,
            consumed_samples=8 * step,
            optimizer_steps=step - 1,
            seed=7,
            loss_scale={"scale": 65536.0, "good_steps": 3},
            run_config={"training": {"max_steps": 1000, "learning_rate": 1e-4}},
            model_config=self.layout.config.to_dict(),
            tokenizer_sha256=TOKENIZER,
            data_sha256={"train": "cd" * 32},
            precision="fp32",
            layout=WrittenLayout(tensor=self.tensor, pipeline=self.pipeline, data=self.data, schedule="1f1b"),
            tensors=self.table,
        )

    def shards(self, known: Known, rank: int) -> list[ShardState]:
        """What the rank would hand to the writer. Everything that is padding is NaN and may never come back."""
        here = self.shape.mesh_rank(rank)
        layout = self.flat_layout(here.pipeline, here.tensor)
        values = {}
        for state in STATES:
            flats = [torch.full((size,), float("nan")) for size in layout.sizes]
            for name, target in layout.views(flats).items():
                full = known[state][name]
                if sharding_rules.parameter_sharding(name).kind == sharding_rules.VOCAB:
                    rows = sharding_rules.padded_vocabulary(full.shape[0], tensor_parallel_size=self.tensor)
                    padding = torch.full((rows - full.shape[0], *full.shape[1:]), float("nan"))
                    full = torch.cat([full, padding])
                    # cut_tensor would pad for the padded size once more
                    target.copy_(full.chunk(self.tensor)[here.tensor])
                else:
                    target.copy_(cut_tensor(full, name, rank=here.tensor, size=self.tensor))
            values[state] = [flat.chunk(self.data)[here.data].clone() for flat in flats]
        return [ShardState(*parts) for parts in zip(*(values[state] for state in STATES), strict=True)]


@functools.cache
def known_tensors(model: str, offset: int = 0) -> Known:
    """Full tensors in which no number occurs twice, exact in float32."""
    start, known = 1 + offset, {}
    for state in STATES:
        known[state] = {}
        for name, shape in Case(model=model).layout.full_shapes.items():
            count = torch.Size(shape).numel()
            known[state][name] = torch.arange(start, start + count, dtype=torch.float32).view(shape)
            start += count
    assert start < 2**24
    return known


def write_checkpoint(directory: Path, case: Case, *, step: int = 100, offset: int = 0, keep_last: int = 100) -> Path:
    """Writes a checkpoint as the ranks of ``case`` would, one after another."""
    known = known_tensors(case.model, offset)
    writers = [CheckpointWriter(directory, rank=rank) for rank in range(case.shape.world_size)]
    for rank, writer in enumerate(writers):
        writer.begin(step, shards=case.shards(known, rank), token=f"t{step}")
    assert [writer.wait().error for writer in writers] == [None] * len(writers)
    for writer in writers[1:]:
        writer.release()
    return writers[0].commit(case.manifest(step), keep_last=keep_last)


def assert_readable(reader: CheckpointReader, case: Case, known: Known) -> None:
    """Every rank of ``case`` reads its slices and its shards, bit for bit; padding is zeros."""
    for rank in range(case.shape.world_size):
        here = case.shape.mesh_rank(rank)
        layout = case.flat_layout(here.pipeline, here.tensor)
        flats = {state: [torch.zeros(size) for size in layout.sizes] for state in STATES}
        for state in STATES:
            for name, target in layout.views(flats[state]).items():
                target.copy_(cut_tensor(known[state][name], name, rank=here.tensor, size=case.tensor))
                if here.data == 0:
                    cut = local_cut(name, full_shape=reader.shape(name), rank=here.tensor, size=case.tensor)
                    found = reader.read(name, state=state, cut=cut)
                    assert torch.equal(found, target), name
        shards = reader.read_shards(layout, shape=case.shape, mesh_rank=here)
        for flat, shard in enumerate(shards):
            for state in STATES:
                assert torch.equal(getattr(shard, state), flats[state][flat].chunk(case.data)[here.data])


CASES = [
    Case(),
    Case(tensor=2, pipeline=2, data=2),
    Case(tensor=4, data=3),
    Case(pipeline=4, data=2),
    Case(data=5),
    Case(tensor=2, pipeline=2, stages_per_rank=2),
    Case(model="v1"),
    Case(tensor=4, pipeline=2, data=2, model="v1"),
    Case(tensor=2, data=7, model="v1"),
]


@functools.cache
def files_for(case: Case) -> dict[str, FileEntry]:
    """File entries large enough for anything."""
    names = {
        flat_range.file for entry in case.table.values() for tensor_slice in entry.slices for flat_range in tensor_slice.ranges
    }
    return {name: FileEntry(bytes=2**40, sha256="0" * 64) for name in names}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_table_tiles_everything_once(case: Case) -> None:
    check_table(case.table, files=files_for(case), where="x")
    assert list(case.table) == list(case.layout.full_shapes)
    counts: Counter[str] = Counter()
    for name, entry in case.table.items():
        assert entry.shape == case.layout.full_shapes[name]
        assert entry.cut_dim == sharding_rules.parameter_sharding(name).dim
        for tensor_slice in entry.slices:
            counts[name] += sum(flat_range.count for flat_range in tensor_slice.ranges)
    words = "deberta.embeddings.word_embeddings.weight"
    padded = sharding_rules.padded_vocabulary(203, tensor_parallel_size=case.tensor)
    assert counts[words] == padded * 16
    assert all(
        counts[name] == torch.Size(shape).numel()
        for name, shape in case.layout.full_shapes.items()
        if sharding_rules.parameter_sharding(name).kind != sharding_rules.VOCAB
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parts_of_all_shards_are_the_pieces_of_the_table(case: Case) -> None:
    ranges = {
        (name, flat_range.file, flat_range.flat, flat_range.offset, flat_range.begin, flat_range.count)
        for name, entry in case.table.items()
        for tensor_slice in entry.slices
        for flat_range in tensor_slice.ranges
    }
    parts = set()
    for rank in range(case.shape.world_size):
        here = case.shape.mesh_rank(rank)
        layout = case.flat_layout(here.pipeline, here.tensor)
        own = shard_slices(layout, shape=case.shape, mesh_rank=here, full_shapes=case.layout.full_shapes)
        for flat, found in enumerate(own):
            ends = [part.offset + part.count for part in found]
            assert all(part.offset >= end for part, end in zip(found[1:], ends, strict=False))
            parts |= {(part.name, f"rank-{rank:05d}.safetensors", flat, part.offset, part.begin, part.count) for part in found}
    assert parts == ranges


def test_local_cut_is_the_cut_of_training() -> None:
    for size in (1, 2, 4):
        for name, shape in Case().layout.full_shapes.items():
            full = torch.zeros(shape)
            for rank in range(size):
                cut = local_cut(name, full_shape=shape, rank=rank, size=size)
                expected = list(shape)
                if cut:
                    expected[cut[0]] = cut[2] - cut[1]
                assert list(cut_tensor(full, name, rank=rank, size=size).shape) == expected


def _with_piece(entry: TensorEntry, **changes: object) -> TensorEntry:
    tensor_slice = entry.slices[0]
    ranges = (dataclasses.replace(tensor_slice.ranges[0], **changes), *tensor_slice.ranges[1:])
    return dataclasses.replace(entry, slices=(dataclasses.replace(tensor_slice, ranges=ranges), *entry.slices[1:]))


def _with_region(entry: TensorEntry, **changes: object) -> TensorEntry:
    return dataclasses.replace(entry, slices=(dataclasses.replace(entry.slices[0], **changes), *entry.slices[1:]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry: dataclasses.replace(entry, slices=()), "0 slices"),
        (lambda entry: dataclasses.replace(entry, slices=entry.slices[:1]), "slices end at"),
        (lambda entry: dataclasses.replace(entry, slices=entry.slices[::-1]), "side by side"),
        (lambda entry: dataclasses.replace(entry, slices=entry.slices * 2), "side by side"),
        (lambda entry: dataclasses.replace(entry, cut_dim=None), "2 slices"),
        (lambda entry: dataclasses.replace(entry, cut_dim=2), "cannot be cut"),
        (lambda entry: dataclasses.replace(entry, cut_dim=1), "slices end at 128 and not at 16"),
        (lambda entry: dataclasses.replace(entry, shape=(2**40, 16)), "slices end at 256"),
        (lambda entry: _with_region(entry, stop=127), "elements, not"),
        (lambda entry: _with_region(entry, stop=0), "side by side"),
        (lambda entry: _with_region(entry, ranges=()), "have 0 elements"),
        (lambda entry: _with_piece(entry, count=0), "side by side"),
        (lambda entry: _with_piece(entry, begin=1), "side by side"),
        (lambda entry: _with_piece(entry, count=2**62), "side by side|elements, not"),
        (lambda entry: _with_piece(entry, offset=2**62), "outside"),
        (lambda entry: _with_piece(entry, file="rank-99999.safetensors"), "not one of the files"),
    ],
)
def test_a_table_with_a_hole_is_refused(change, message: str) -> None:
    case = Case(tensor=2, data=2)
    words = "deberta.embeddings.word_embeddings.weight"
    table = {**case.table, words: change(case.table[words])}
    with pytest.raises(CheckpointError, match=message):
        check_table(table, files=files_for(case), where="x")


def test_elements_used_twice_are_refused() -> None:
    case = Case()
    name, other = "deberta.encoder.layer.0.output.dense.weight", "deberta.encoder.layer.1.output.dense.weight"
    table = {**case.table, other: case.table[name]}
    with pytest.raises(CheckpointError, match="used twice"):
        check_table(table, files=files_for(case), where="x")
