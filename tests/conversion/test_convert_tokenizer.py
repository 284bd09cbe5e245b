"""The exported tokenizer splits text as SentencePiece does, and says where it does not."""

import json
from pathlib import Path

import pytest
import sentencepiece
import transformers

from deberta_dist.conversion import tokenizer_files
from deberta_dist.conversion.convert import convert
from deberta_dist.conversion.source import SPM_NAME
from deberta_dist.conversion.tokenizer_files import PROBE, build_tokenizer_json, compare
from deberta_dist.data.sentencepiece_model import CONTROL, NORMAL, UNKNOWN, parse_model
from deberta_dist.data.tokenizer import Tokenizer, train_tokenizer
from deberta_dist.errors import DataError
from tests.conversion.small_models import FOLDER, export, make_model

# The library replaces a cluster of characters by what its first match stands for, and forgets the accent.
KNOWN_DIFFERENCES = ["ligature and accent \ufb01\u0301x"]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    lines = []
    with open(FOLDER / "launchers/demo_text/valid.jsonl", encoding="utf-8") as file:
        for row in file:
            lines += [line for line in json.loads(row)["text"].split("\n") if line.strip()]
    return lines


@pytest.fixture(scope="module")
def spm(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / SPM_NAME
    train_tokenizer(texts, path, vocab_size=500)
    return path


def test_auto_tokenizer_splits_alike(spm: Path, texts: list[str], tmp_path: Path) -> None:
    report = convert(export(make_model("v2"), tmp_path / "a"), tmp_path / "hf", to="huggingface", tokenizer_path=spm)
    ours, theirs = Tokenizer(spm), transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", local_files_only=True)
    sample = texts[:: max(1, len(texts) // 200)][:200]
    assert len(sample) == 200
    for text in (*sample, *PROBE):
        if text not in KNOWN_DIFFERENCES:
            assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text), ascii(text)
    assert report["tokenizer"]["compared"] and report["tokenizer"]["differences"] == KNOWN_DIFFERENCES
    assert "ligature and accent" in report["tokenizer"]["message"]
    assert "ligature and accent" in (tmp_path / "hf/README.md").read_text()
    special = (theirs.pad_token_id, theirs.cls_token_id, theirs.sep_token_id, theirs.unk_token_id, theirs.mask_token_id)
    assert special == ours.special_ids and len(theirs) == ours.num_tokens
    assert theirs.model_max_length == 64
    pair = theirs("the time", "a machine")
    a, b = ours.encode("the time"), ours.encode("a machine")
    assert pair["input_ids"] == [1, *a, 2, *b, 2]
    assert pair["token_type_ids"] == [0] * (len(a) + 2) + [1] * (len(b) + 1)
    masked = theirs("the [MASK] machine", add_special_tokens=False)["input_ids"]
    assert masked == [*ours.encode("the"), ours.mask_id, *ours.encode("machine")]
    assert (tmp_path / "hf" / SPM_NAME).read_bytes() == spm.read_bytes()


def test_it_travels_with_the_weights(spm: Path, tmp_path: Path) -> None:
    source = export(make_model("v2"), tmp_path / "a")
    (source / SPM_NAME).write_bytes(spm.read_bytes())
    convert(source, tmp_path / "official", to="official")
    convert(tmp_path / "official", tmp_path / "hf", to="huggingface")
    config = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    (tmp_path / "hf/tokenizer_config.json").write_text(json.dumps({**config, "mine": 1}))
    report = convert(tmp_path / "hf", tmp_path / "again", to="huggingface")
    assert report["tokenizer"]["message"].startswith("The tokenizer files of the source, unchanged. `tokenizer.json` splits")
    assert report["tokenizer"]["compared"] and report["tokenizer"]["differences"] == KNOWN_DIFFERENCES
    for name in ("tokenizer.json", "tokenizer_config.json", SPM_NAME):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    convert(tmp_path / "hf", tmp_path / "new", to="huggingface", tokenizer_path=spm)
    assert "mine" not in json.loads((tmp_path / "new/tokenizer_config.json").read_text())


def test_without_the_library_nothing_is_claimed(spm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_files.importlib.util, "find_spec", lambda name: None)
    report = convert(export(make_model("v2"), tmp_path / "a"), tmp_path / "hf", to="huggingface", tokenizer_path=spm)
    assert not report["tokenizer"]["compared"] and "was not compared" in report["tokenizer"]["message"]
    assert (tmp_path / "hf/tokenizer.json").exists()


def test_a_tokenizer_that_does_not_belong_is_refused(spm: Path, texts: list[str], tmp_path: Path) -> None:
    source = export(make_model("v2"), tmp_path / "a")
    train_tokenizer(texts, tmp_path / "large.model", vocab_size=600)
    with pytest.raises(DataError, match="has 601 tokens, the model 512"):
        convert(source, tmp_path / "no", to="huggingface", tokenizer_path=tmp_path / "large.model")
    (source / SPM_NAME).write_bytes(b"nonsense")
    report = convert(source, tmp_path / "yes", to="huggingface")
    assert "not a sentencepiece model" in report["tokenizer"]["message"] and report["tokenizer"]["files"] == []


def trained(texts: list[str], path: Path, **options: object) -> Path:
    """A model that the product's own training would not make."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(path.with_suffix("")), pad_id=0, bos_id=1, eos_id=2, unk_id=3,
        pad_piece="[PAD]", bos_piece="[CLS]", eos_piece="[SEP]", unk_piece="[UNK]", minloglevel=9, **options,
    )  # fmt: skip
    return path


def test_bytes_for_unknown_characters(texts: list[str], tmp_path: Path) -> None:
    """The tokenizers of the releases have them."""
    spm = trained(texts, tmp_path / "bytes.model", vocab_size=500, byte_fallback=True)
    report = convert(export(make_model("v2"), tmp_path / "a"), tmp_path / "hf", to="huggingface", tokenizer_path=spm)
    ours, theirs = Tokenizer(spm), transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", local_files_only=True)
    told = report["tokenizer"]["differences"]
    for text in (*texts[:50], *PROBE, "a <0x00> b"):
        assert (theirs(text, add_special_tokens=False)["input_ids"] != ours.encode(text)) == (text in told), ascii(text)
    assert theirs.decode(ours.encode("smile \U0001f600 twice")) == "smile \U0001f600 twice"
    assert "a <0x00> b" in told and len(told) <= 4


def test_pieces_that_no_text_has(texts: list[str], tmp_path: Path) -> None:
    options = {"control_symbols": ["<sep>"], "user_defined_symbols": ["<mine>"]}
    spm = trained(texts, tmp_path / "odd.model", vocab_size=500, **options)
    report = convert(export(make_model("v2"), tmp_path / "a"), tmp_path / "hf", to="huggingface", tokenizer_path=spm)
    ours, theirs = Tokenizer(spm), transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", local_files_only=True)
    assert theirs("a <mine> b", add_special_tokens=False)["input_ids"].count(ours.encode("<mine>")[-1]) == 1
    for text in ("a <sep> b", "a <mine> b"):
        is_different = theirs(text, add_special_tokens=False)["input_ids"] != ours.encode(text)
        assert is_different == (text in report["tokenizer"]["differences"]), text
    assert "a <sep> b" in report["tokenizer"]["differences"]


def test_what_tokenizer_json_cannot_say_is_told(texts: list[str], tmp_path: Path) -> None:
    spm = trained(texts, tmp_path / "bpe.model", vocab_size=500, model_type="bpe")
    report = convert(export(make_model("v2"), tmp_path / "a"), tmp_path / "hf", to="huggingface", tokenizer_path=spm)
    assert report["tokenizer"]["files"] == [SPM_NAME]
    assert "`AutoTokenizer` cannot load it" in report["tokenizer"]["message"]
    assert "Use `AutoTokenizer`" not in (tmp_path / "hf/README.md").read_text()


def test_the_probe_finds_a_missing_normaliser(spm: Path) -> None:
    content = build_tokenizer_json(parse_model(spm.read_bytes()))
    content["normalizer"]["normalizers"] = [{"type": "NFC"}]
    assert len(compare(json.dumps(content), tokenizer=Tokenizer(spm), texts=PROBE) or []) >= 5


def test_the_model_file_is_read_as_sentencepiece_reads_it(spm: Path) -> None:
    model, tokenizer = parse_model(spm.read_bytes()), Tokenizer(spm)
    assert [piece.text for piece in model.pieces] == tokenizer.pieces(range(tokenizer.num_tokens - 1))
    assert [piece.kind for piece in model.pieces[:5]] == [CONTROL, CONTROL, CONTROL, UNKNOWN, NORMAL]
    assert all(piece.score < 0 for piece in model.pieces[4:]) and len(model.charsmap) > 100_000
    assert model.add_dummy_prefix and model.remove_extra_whitespaces and not model.byte_fallback
    content = spm.read_bytes()
    for damaged in (content[:-3], content[:1000], b"\xff" * 20, b"\x0b" * 9, b"\x08\x01"):
        try:
            parse_model(damaged)
        except DataError as error:
            assert "damaged" in str(error)
