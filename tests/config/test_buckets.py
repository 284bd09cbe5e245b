"""Keys of dynamic batching: what is refused, what a micro-batch looks like, and that both survive being written."""

from collections.abc import Callable
from pathlib import Path

import pytest

from deberta_dist.config import load_config, resolve
from deberta_dist.config.write import to_toml
from deberta_dist.errors import ConfigError


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("bucket_lengths = [128, 256]", "data.bucket_lengths = [128, 256] must ascend to data.max_seq_length = 512"),
        ("bucket_lengths = [256, 128, 512]", "must ascend to"),
        ("bucket_lengths = [128, 128, 512]", "must ascend to"),
        ("bucket_lengths = [2, 512]", "data.bucket_lengths = 2; expected a number from 3 to 262144"),
        ("bucket_lengths = [128.0, 512]", "data.bucket_lengths = 128.0; expected a valid integer"),
        ("bucket_lengths = []", "data.bucket_lengths"),
        ("bucket_lengths = 512", "data.bucket_lengths = 512; expected a valid tuple"),
        ("bucket_lengths = [96, 512]",
         "data.bucket_lengths: 96 does not divide training.micro_batch_size = 4 x data.max_seq_length = 512 = 2048"),
        ("bucket_lengths = [128, 512]\ndocument_boundaries = true", "data.document_boundaries = true has nothing to separate"),
        ('index_directory = "lists"', "lists has no effect without data.bucket_lengths"),
    ],
)  # fmt: skip
def test_refused(spoil: Callable[[str, str], Path], lines: str, expected: str) -> None:
    toml = spoil("[training]", f"{lines}\n\n[training]")
    with pytest.raises(ConfigError) as refusal:
        load_config(toml)
    assert str(toml) in str(refusal.value) and expected in str(refusal.value)


def test_shapes_have_as_many_tokens_and_come_back_from_a_file(toml: Path, tmp_path: Path) -> None:
    assert load_config(toml).micro_batch_shapes == ((4, 512),)
    words = ["--data.bucket_lengths", "[64, 128, 512]", "--data.index_directory", str(tmp_path)]
    config = resolve(load_config(toml, words), 4)
    assert config.micro_batch_shapes == ((32, 64), (16, 128), (4, 512))
    written = tmp_path / "written.toml"
    written.write_text(to_toml(config))
    assert load_config(written).data == config.data
    assert config.data.index_directory == tmp_path
