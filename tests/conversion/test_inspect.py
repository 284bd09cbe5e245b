"""What the inspection tool says, and which differences it finds."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from deberta_dist.conversion.convert import convert
from deberta_dist.conversion.inspect import describe, describe_difference, difference, differs, inspect
from tests.conversion.small_models import export, make_model, published_tensors
from tests.harness import run_script
from tests.tool_calls import FOLDER, assert_one_line_error, call

TABLE = "deberta.encoder.rel_embeddings.weight"


def test_groups_and_checksums(tmp_path: Path) -> None:
    model = make_model("v2")
    source = export(model, tmp_path / "source")
    found = inspect(source)
    assert found["num_parameters"] == sum(found["groups"].values()) == sum(p.numel() for p in model.parameters())
    assert found["groups"]["convolution"] == sum(p.numel() for p in model.deberta.encoder.conv.parameters())
    assert found["groups"]["word embeddings"] == 512 * 64 and "other" not in found["groups"]
    assert found["config"] == model.config.to_dict() and found["dtype"] == ["float32"]
    assert found["checksums"] == "none recorded" and found["problems"] == []
    convert(source, tmp_path / "hf", to="huggingface", max_shard_bytes=200_000)
    found = inspect(tmp_path / "hf")
    assert "files are as they were written" in found["checksums"]
    assert found["num_bytes"] == sum(path.stat().st_size for path in (tmp_path / "hf").iterdir())
    assert "Hugging Face" in describe(found) and "word embeddings" in describe(found)
    shard = sorted((tmp_path / "hf").glob("model-00002-of-*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert inspect(tmp_path / "hf")["checksums"] == f"DAMAGED: {shard.name} is not what was written"


def test_what_is_not_a_model_is_shown_with_its_problem(tmp_path: Path) -> None:
    model = make_model("v2")
    source = export(model, tmp_path / "source")
    save_file({**published_tensors(model), "x": torch.zeros(3)}, source / "model.safetensors")
    found = inspect(source)
    assert found["groups"]["other"] == 3 and "not explained: x" in found["problems"][0]


def test_differences_across_formats(tmp_path: Path) -> None:
    model = make_model("v1")
    source = export(model, tmp_path / "source")
    convert(source, tmp_path / "official", to="official", is_fused=True)
    convert(source, tmp_path / "hf", to="huggingface")
    for other in ("official", "hf"):
        found = difference(source, tmp_path / other)
        assert found["equal"] == len(published_tensors(model))
        assert not found["values"] and not found["only_here"] and not found["only_there"]
        # Hugging Face's file says what is absent in ours and means the same.
        assert found["config"] == {} and not differs(found)
    tensors = published_tensors(model)
    changed = {
        **tensors,
        TABLE: tensors[TABLE].clone(),
        "lm_predictions.lm_head.bias": tensors["lm_predictions.lm_head.bias"].clone(),
    }
    changed[TABLE][5, 7] += 0.25
    changed["lm_predictions.lm_head.bias"][3] = float("nan")
    save_file(changed, source / "model.safetensors")
    found = difference(tmp_path / "hf", source)
    assert abs(found["values"][TABLE] - 0.25) < 1e-6 and len(found["values"]) == 2
    assert found["values"]["lm_predictions.lm_head.bias"] == "nan"
    assert differs(found) and "largest difference 0.25: " + TABLE in describe_difference(found)
    found = difference(source, export(make_model("v2"), tmp_path / "v2"))
    assert found["shapes"][TABLE] == [[128, 64], [32, 64]]
    assert "deberta.encoder.conv.conv.weight" in found["only_there"]
    assert found["config"]["position_buckets"] == [-1, 16]


def test_from_the_command_line(tmp_path: Path) -> None:
    source = export(make_model("v2"), tmp_path / "source")
    convert(source, tmp_path / "target", to="deberta_dist", dtype="bfloat16")
    shown = run_script([FOLDER / "tools" / "inspect_checkpoint.py", "source"], cwd=tmp_path)
    assert shown.returncode == 0 and "deberta_dist weights with published names" in shown.stdout
    assert json.loads(call("inspect_checkpoint.py", "source", "--json", cwd=tmp_path).stdout)["num_tensors"] == 80
    assert call("inspect_checkpoint.py", "source", "--diff", "source", cwd=tmp_path).returncode == 0
    shown = call("inspect_checkpoint.py", "source", "--diff", "target", cwd=tmp_path)
    assert shown.returncode == 1 and "largest difference" in shown.stdout
    assert_one_line_error(call("inspect_checkpoint.py", "nowhere", cwd=tmp_path), code=65, words="does not exist")
