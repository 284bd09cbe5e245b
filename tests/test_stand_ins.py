"""What lies in place of a file is told by every reader of every room, with the file and what to do."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deberta_dist.checkpoint.manifest import read_manifest
from deberta_dist.config import deepspeed_file
from deberta_dist.config.recipes import read_toml
from deberta_dist.conversion import files
from deberta_dist.conversion.safetensors_files import read_safetensors
from deberta_dist.conversion.torch_files import TorchFile
from deberta_dist.data.corpus_index import read_index
from deberta_dist.data.token_file import TokenFile
from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.errors import ConfigError, DataError
from deberta_dist.files.foreign import format_name
from deberta_dist.planning.machine import read_calibration
from deberta_dist.preparation.filtering.contamination import benchmark_ngrams
from deberta_dist.preparation.formats.megatron import MegatronFile
from deberta_dist.preparation.reading.texts import read_texts
from deberta_dist.tasks.base import Release
from deberta_dist.tasks.glue.mnli import read_mnli
from deberta_dist.tasks.predictions import described, read_predictions
from deberta_dist.tasks.superglue.benchmark import SUPERGLUE
from deberta_dist.tasks.superglue.tasks import TASKS

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a" * 16 + b"\nsize 1234567\n"
ANNEX = b"/annex/objects/SHA256E-s1234--4d7a.bin\n"
IN_PLACE = {
    POINTER: "a Git LFS pointer, not the file itself (1,234,567 bytes): run git lfs pull in its repository",
    ANNEX: "a git-annex pointer, not the file itself: run git annex get (or datalad get) in its repository",
    b"\xef\xbb\xbf\n<!DOCTYPE HTML>\n<title>Log in</title>": "an HTML page saved in place of the file: download it again",
    b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>": "an XML document saved in place of the file",
    b"Invalid username or password.": "a server's answer saved in place of the file (Invalid username or password.)",
}

READERS: dict[str, Callable[[Path], Any]] = {
    **{name: lambda path: list(read_texts([path])) for name in ("a.txt", "a.jsonl", "a.txt.gz", "a.json.zst", "a.parquet")},
    **{name: lambda path: benchmark_ngrams([path]) for name in ("b.tsv", "b.parquet")},
    "spm.model": Tokenizer,
    "x.tokens": TokenFile,
    "index.json": lambda path: read_index(path.parent),
    "x.idx": lambda path: MegatronFile(path.with_suffix("")),
    "x.bin": lambda path: MegatronFile(path.with_suffix("")),
    "model.safetensors": read_safetensors,
    "pytorch_model.bin": TorchFile,
    "config.json": files.read_json,
    "vocab.txt": lambda path: files.inside(path.parent, path.name),
    "manifest.json": lambda path: read_manifest(path.parent),
    "run.toml": read_toml,
    "zero3.json": lambda path: deepspeed_file.read_json(path),
    "calibration.json": read_calibration,
    "combined.zip": lambda path: Release(path, SUPERGLUE),
    "BoolQ/val.jsonl": lambda path: Release(path.parents[1], SUPERGLUE).read(TASKS["BoolQ"], "val"),
    "test.jsonl": read_predictions,
    "BoolQ/run.json": lambda path: described(path.parents[1], TASKS["BoolQ"]),
    "dev_matched.tsv": lambda path: read_mnli(path.parent, "val"),
}
MAY_BE_A_PAGE = ("a.txt", "b.tsv", "vocab.txt")


@pytest.mark.parametrize("name", READERS)
def test_every_reader_tells_what_lies_in_place_of_a_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    contents = list(itertools.islice(IN_PLACE.items(), 2 if name in MAY_BE_A_PAGE else None))
    for content, message in contents:
        path.write_bytes(content)
        with pytest.raises((DataError, ConfigError)) as raised:
            READERS[name](path)
        told = str(raised.value)
        assert f"{path} is {message}" in told and "\n" not in told


def test_files_of_torch_save(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "new.bin")
    torch.save({"a": torch.zeros(2)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert format_name((tmp_path / "new.bin").read_bytes()[:1024]) == "a file of torch.save"
    assert format_name((tmp_path / "old.bin").read_bytes()[:1024]) == "a pickle, such as an old file of torch.save"
    with pytest.raises(DataError, match=r"new.bin is not a safetensors file: .*; it begins like a file of torch.save"):
        read_safetensors(tmp_path / "new.bin")
    (tmp_path / "w.bin").write_bytes(b"\x08\0\0\0\0\0\0\0" + b'{"a":{}}')
    with pytest.raises(DataError, match=r"w.bin is refused: .*; it begins like a safetensors file"):
        TorchFile(tmp_path / "w.bin")
