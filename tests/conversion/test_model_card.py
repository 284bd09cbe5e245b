"""The card of a Hugging Face directory as the hub reads it: YAML at its top, and numbers of the run that made the weights."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from deberta_dist.conversion.convert import convert
from deberta_dist.errors import ConfigError
from tests.checkpoint.test_slices import Case, write_checkpoint
from tests.conversion.small_models import export, make_model
from tests.preparation.test_tools import assert_one_line_error
from tests.tool_calls import call


def front(directory: Path) -> dict:
    """The fields at the top, read by a YAML parser and by the hub's own library, which have to agree."""
    text = (directory / "README.md").read_text()
    fields = yaml.safe_load(text.split("---\n")[1])
    assert ModelCard(text).data.to_dict() == fields
    return fields


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("v3", {}, {"pipeline_tag": "fill-mask"}),
        ("v3_discriminator", {"license_name": "mit"}, {"pipeline_tag": "feature-extraction", "license": "mit"}),
        (
            "v2_classification",
            # Norwegian is false in YAML without quotes.
            {"license_name": "other: A 'licence': ours , LICENSE", "languages": ["no,en", "en"]},
            {
                "pipeline_tag": "text-classification",
                "license": "other",
                "license_name": "A 'licence': ours",
                "license_link": "LICENSE",
                "language": ["no", "en"],
            },
        ),
    ],
)
def test_what_the_hub_reads(tmp_path: Path, name: str, options: dict, expected: dict) -> None:
    convert(export(make_model(name), tmp_path / "source"), tmp_path / "hf", to="huggingface", **options)
    assert front(tmp_path / "hf") == {"library_name": "transformers", "tags": ["deberta"], **expected}
    # Weights alone do not say how they were trained.
    assert "## Training" not in (tmp_path / "hf/README.md").read_text()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--license", "Apache 2.0"), "the nearest is apache-2.0"),
        (("--license", "other"), "'other:NAME'"),
        (("--license", "other: ,LICENSE"), "'other:NAME'"),
        (("--license", "mit\nbase_model: x"), "not an identifier that the hub knows"),
        (("--language", "english"), "not a language code"),
        (("--language", "en,"), "not a language code"),
        (("--language", "EN"), "not a language code"),
    ],
)
def test_what_the_hub_would_refuse(tmp_path: Path, flags: tuple[str, str], words: str) -> None:
    # Before the source is looked at.
    result = call("convert_checkpoint.py", "nowhere", "target", "--to", "huggingface", *flags, cwd=tmp_path)
    assert_one_line_error(result, code=2, words=words)
    assert list(tmp_path.iterdir()) == []


class _OfARun(Case):
    config = {
        "training": {"max_steps": 100, "global_batch_size": 32},
        "optimizer": {"learning_rate": 4e-3},
        "schedule": {"warmup_steps": 50},
        "data": {"max_seq_length": 128, "train": "/home/someone/corpus/train", "mask_probability": 0.15, "max_ngram": 3},
    }

    def manifest(self, step: int = 100):
        return dataclasses.replace(super().manifest(step), run_config=self.config)


def test_numbers_of_the_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_checkpoint(run / "checkpoints", _OfARun(tensor=2, pipeline=2, data=2), step=100)
    lines = [{"step": 99, "loss": 9.0}, {"step": 100, "loss": 6.5}, {"step": 101, "loss": 7.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 100, "lo')
    (run / "result.json").write_text(json.dumps({"loss": 6.25, "accuracy": 0.125, "num_targets": 4000}))
    convert(run, tmp_path / "hf", to="huggingface")
    text = (tmp_path / "hf/README.md").read_text()
    for words in (
        "| steps | 100 of 100, of which 1 were skipped",
        "| tokens read | 102,400 in sequences of up to 128",
        "| batch | 32 sequences, 4,096 tokens |",
        "| learning rate | 0.004 at its highest, after 50 steps of warm-up |",
        "| masking | 15% of the tokens, spans of up to 3 words |",
        "| precision | fp32 |",
        "| layout | tensor 2 x pipeline 2 x data 2 (1f1b) |",
        "| corpus | `corpus/train`, SHA-256 cdcd",
        "| training loss | 6.5000 nats at the last step |",
        "| held-out loss | 6.2500 nats, accuracy 12.50%, of 4,000 masked tokens |",
    ):
        assert words in text, words
    assert "/home/someone" not in text and str(tmp_path) not in text
    # A run that has not ended has no result; what is not known is not said.
    _OfARun.config["training"].pop("global_batch_size")
    write_checkpoint(tmp_path / "other/checkpoints", _OfARun(tensor=1, pipeline=1, data=1), step=50)
    (tmp_path / "other/result.json").write_text((run / "result.json").read_text())
    convert(tmp_path / "other", tmp_path / "hf2", to="huggingface")
    text = (tmp_path / "hf2/README.md").read_text()
    assert "| steps | 50 of 100" in text
    assert all(words not in text for words in ("held-out loss", "training loss", "| batch |"))


def test_licences_are_checked_in_python_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the nearest is gpl-3.0"):
        convert(tmp_path / "nowhere", tmp_path / "target", to="huggingface", license_name="GPL3.0")
