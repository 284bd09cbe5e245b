"""The plan table, by the names of real models, and cutting and joining by it."""

import re

import pytest
import torch

from deberta_dist import DebertaForMaskedLM, preset
from deberta_dist.errors import ConfigError
from deberta_dist.parallel.tensor import sharding_rules
from deberta_dist.parallel.tensor.apply import check_tensor_parallel_sizes, cut_tensor, join_slices

LAYER = r"deberta\.encoder\.layer\.\d+\."
# Written out once more, by parameter and with nothing left over: (pattern, kind, cut dimension).
INTENDED = {
    "tiny-v1": [
        (LAYER + r"attention\.self\.(query|key|value|pos_key|pos_query)_proj\.(weight|bias)", "column", 0),
    ],
    "tiny-v2": [
        (LAYER + r"attention\.self\.(query|key|value)_proj\.(weight|bias)", "column", 0),
        (r"deberta\.encoder\.LayerNorm\.(weight|bias)", "partial", None),
        (r"deberta\.encoder\.conv\.(conv|LayerNorm)\.(weight|bias)", "replicate", None),
    ],
}
COMMON = [
    (LAYER + r"attention\.output\.dense\.weight", "row", 1),
    (LAYER + r"attention\.output\.dense\.bias", "replicate", None),
    (LAYER + r"attention\.output\.LayerNorm\.(weight|bias)", "replicate", None),
    (LAYER + r"intermediate\.dense\.(weight|bias)", "column", 0),
    (LAYER + r"output\.dense\.weight", "row", 1),
    (LAYER + r"output\.dense\.bias", "replicate", None),
    (LAYER + r"output\.LayerNorm\.(weight|bias)", "replicate", None),
    (r"deberta\.embeddings\.word_embeddings\.weight", "vocab", 0),
    (r"deberta\.embeddings\.position_embeddings\.weight", "replicate", None),
    (r"deberta\.embeddings\.LayerNorm\.(weight|bias)", "replicate", None),
    (r"deberta\.encoder\.rel_embeddings\.weight", "partial", None),
    (r"lm_predictions\.lm_head\.bias", "vocab", 0),
    (r"lm_predictions\.lm_head\.(dense|LayerNorm)\.(weight|bias)", "replicate", None),
]


def meta_model(name: str) -> DebertaForMaskedLM:
    with torch.device("meta"):
        return DebertaForMaskedLM(preset(name))


def shapes(name: str) -> dict[str, torch.Size]:
    return {n: p.shape for n, p in meta_model(name).named_parameters()}


@pytest.mark.parametrize("name", INTENDED)
def test_every_parameter_has_the_intended_kind(name: str) -> None:
    table = [*INTENDED[name], *COMMON]
    unused = {pattern for pattern, _, _ in table}
    for parameter in shapes(name):
        matching = [row for row in table if re.fullmatch(row[0], parameter)]
        assert len(matching) == 1, f"{parameter}: {matching}"
        pattern, kind, dim = matching[0]
        assert sharding_rules.parameter_sharding(parameter) == sharding_rules.Sharding(kind, dim), parameter
        unused.discard(pattern)
    assert not unused, "the table above names parameters that do not exist"


@pytest.mark.parametrize("name", INTENDED)
def test_every_pattern_of_the_plan_is_in_use(name: str) -> None:
    modules = [module for module, _ in meta_model(name).named_modules()]
    patterns = {pattern for pattern, _ in sharding_rules.SHARDING_RULES}
    patterns |= {value for key, value in vars(sharding_rules).items() if key.endswith("_PATTERN")}
    if name == "tiny-v1":
        patterns -= {r"deberta\.encoder\.LayerNorm", sharding_rules.HALO_PATTERN}
    for pattern in patterns:
        assert any(re.fullmatch(pattern, module) for module in modules), pattern


def test_what_sequence_parallelism_splits() -> None:
    whole = {
        r"lm_predictions\..*",
        r"deberta\.encoder\.(rel_embeddings|LayerNorm)\..*",
        r"deberta\.encoder\.layer\.3\..*",
        r"deberta\.embeddings\.position_embeddings\.weight",
    }
    names = list(shapes("tiny-v2"))
    for name in names:
        assert sharding_rules.in_sequence_region(name, decoder_layer=3) is not any(re.fullmatch(p, name) for p in whole), name
    # Without an enhanced mask decoder the last layer is like the others, and positions are added to the embeddings.
    split = {name for name in names if sharding_rules.in_sequence_region(name, decoder_layer=None)}
    assert {name for name in names if "layer.3." in name or "position_embeddings" in name} <= split


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", INTENDED)
def test_cut_and_join_are_inverse_bit_for_bit(name: str, size: int) -> None:
    for parameter, shape in shapes(name).items():
        full = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        slices = [cut_tensor(full, parameter, rank=rank, size=size) for rank in range(size)]
        assert len({tuple(part.shape) for part in slices}) == 1
        if sharding_rules.parameter_sharding(parameter).dim is not None:
            assert sum(part.numel() for part in slices) >= full.numel()
            if size > 1:
                assert slices[0].numel() < full.numel()
        assert torch.equal(join_slices(slices, parameter, full_shape=tuple(shape)), full), parameter


@pytest.mark.parametrize("leaf", ["deberta.embeddings.word_embeddings.weight", "lm_predictions.lm_head.bias"])
@pytest.mark.parametrize("size", [2, 4])
def test_vocabulary_is_padded_with_zeros_and_stripped(leaf: str, size: int) -> None:
    shape = (70, 3) if leaf.endswith("weight") else (70,)
    full = torch.randn(shape)
    slices = [cut_tensor(full, leaf, rank=rank, size=size) for rank in range(size)]
    assert [part.shape[0] for part in slices] == [128] * size
    joined = torch.cat(slices)
    assert torch.equal(joined[:70], full) and not joined[70:].any()
    assert torch.equal(join_slices(slices, leaf, full_shape=shape), full)


def test_slices_are_whole_heads() -> None:
    # Rows of a projection are head after head; a rank's rows must be consecutive heads.
    heads, width = 4, 3
    full = torch.arange(heads).repeat_interleave(width)[:, None].float().expand(-1, 5)
    name = "deberta.encoder.layer.3.attention.self.pos_query_proj.weight"
    assert cut_tensor(full, name, rank=1, size=2)[:, 0].tolist() == [2.0] * width + [3.0] * width
    # ... and the columns of the output projection are the same heads.
    out = cut_tensor(full.T.contiguous(), "deberta.encoder.layer.3.attention.output.dense.weight", rank=1, size=2)
    assert out[0].tolist() == [2.0] * width + [3.0] * width


@pytest.mark.parametrize(
    ("vocabulary", "size", "rows"),
    [
        (70, 1, 70),
        (128_100, 1, 128_100),
        (1, 2, 256),
        (256, 2, 256),
        (257, 2, 512),
        (128_100, 2, 128_256),
        (128_100, 8, 129_024),
        (50_265, 4, 50_688),
    ],
)
def test_padded_vocabulary(vocabulary: int, size: int, rows: int) -> None:
    found = sharding_rules.padded_vocabulary(vocabulary, tensor_parallel_size=size)
    assert found == rows
    assert size == 1 or (found % (128 * size) == 0 and 0 <= found - vocabulary < 128 * size)


def test_local_slices_cover_a_dimension() -> None:
    parts = [sharding_rules.local_slice(12, rank=rank, size=4) for rank in range(4)]
    assert [index for part in parts for index in range(12)[part]] == list(range(12))
    with pytest.raises(AssertionError):
        sharding_rules.local_slice(13, rank=0, size=4)


def test_check_split_names_key_value_and_what_would_fit() -> None:
    check_tensor_parallel_sizes(num_attention_heads=12, intermediate_size=48, tensor_parallel_size=4)
    with pytest.raises(ConfigError) as heads:
        check_tensor_parallel_sizes(num_attention_heads=12, intermediate_size=48, tensor_parallel_size=8)
    assert "parallel.tensor_parallel_size = 8" in str(heads.value)
    assert "model.num_attention_heads = 12" in str(heads.value)
    assert "1, 2, 3, 4, 6, 12" in str(heads.value)
    with pytest.raises(ConfigError) as features:
        check_tensor_parallel_sizes(num_attention_heads=12, intermediate_size=50, tensor_parallel_size=4)
    assert "parallel.tensor_parallel_size = 4 does not divide model.intermediate_size = 50" in str(features.value)
