"""Every tokenizer file of a source goes along, and what its files say about text and ids stays true."""

import importlib
import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers
from tokenizers import ByteLevelBPETokenizer

from deberta_dist import load_masked_lm
from deberta_dist.checkpoint.errors import CheckpointError
from deberta_dist.conversion.convert import convert
from deberta_dist.conversion.tokenizer_names import VOCABULARIES, is_tokenizer_file, missing_files, stem_of
from deberta_dist.data.tokenizer import train_tokenizer
from tests.conversion.small_models import FOLDER, export, make_model
from tests.tool_calls import call

TEXTS = (
    "The Time Machine, a Program (of) THE file.",
    "café résumé Ångström naïve",
    "漢字 かな 각",
    "😀 emoji 👩‍👩‍👧",
    "  several   spaces  here ",
    "line\nbreak\ttab",
    "hello , world ; ok",
    "don't stop",
    "a [MASK] b",
    "a[MASK]b",
    "x [CLS] y [SEP]",
    "<user> said <User> hi, <user>x",
    "UPPER [MASK] CASE [UNK] x",
    "",
)
"""Upper case, accents, other scripts, pictures, spaces, punctuation, special and added tokens."""


@pytest.fixture(scope="module")
def lines() -> list[str]:
    with open(FOLDER / "launchers/demo_text/valid.jsonl", encoding="utf-8") as file:
        return [line for row in file for line in json.loads(row)["text"].split("\n")]


@pytest.fixture(scope="module")
def spm(lines: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("spm") / "spm.model"
    train_tokenizer(lines, path, vocab_size=500)
    return path


def source_of(directory: Path, *, model: str = "v2", config: dict[str, Any] | None = None, **files: Any) -> Path:
    """A Hugging Face directory with JSON files, texts, or copies of files in it, by name with ``__`` for the dot."""
    export(make_model(model), directory)
    kind = "deberta" if model.startswith("v1") else "deberta-v2"
    whole = json.loads((directory / "config.json").read_text()) | {"model_type": kind} | (config or {})
    (directory / "config.json").write_text(json.dumps(whole))
    for key, content in files.items():
        path = directory / key.replace("__", ".")
        if isinstance(content, Path):
            shutil.copy(content, path)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return directory


def loaded(directory: Path) -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)


def same_ids(a: Path, b: Path) -> None:
    ours, theirs = loaded(b), loaded(a)
    for text in TEXTS:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], (ascii(text), theirs.tokenize(text), ours.tokenize(text))
    assert ours("a b", "c")["input_ids"] == theirs("a b", "c")["input_ids"]
    assert ours.all_special_tokens == theirs.all_special_tokens and len(ours) == len(theirs)


def test_the_table_is_that_of_every_class() -> None:
    root = Path(transformers.__file__).parent
    found: dict[str, set[str]] = defaultdict(set)
    for path in sorted(root.rglob("tokenization_*.py")):
        name = "transformers." + ".".join(path.relative_to(root).with_suffix("").parts)
        try:
            module = importlib.import_module(name)
        except (ImportError, NameError):  # of a library that is not installed
            continue
        for key, value in vars(module).items():
            if isinstance(value, type) and value.__module__ == name and hasattr(value, "vocab_files_names"):
                found[stem_of(key)] |= set(map(str, value.vocab_files_names.values()))
    for names in found.values():
        assert all(map(is_tokenizer_file, names)), names
    own = {stem: names - {"tokenizer.json", "tokenizer_config.json"} for stem, names in found.items()}
    # These take whatever there is.
    general = {"PreTrained", "TokenizersBackend", "SentencePieceBackend"}
    assert len(own) > 80
    assert {stem: set(names) for stem, names in VOCABULARIES.items()} == {
        stem: names for stem, names in own.items() if names and stem not in general
    }
    for name in ("README.md", "config.json", "model.safetensors", "spm.vocab.txt", "a/vocab.txt"):
        assert not is_tokenizer_file(name)


WORDS = "\n".join([*"[PAD] [UNK] [CLS] [SEP] [MASK] the time hello ##s , . ( )".split(), *map(chr, range(97, 123))])
WORD_PIECE = {
    "as_bert": {"tokenizer_config__json": {"tokenizer_class": "BertTokenizer", "do_lower_case": True}},
    "cased": {
        "tokenizer_config__json": {"tokenizer_class": "BertTokenizerFast", "do_lower_case": False, "strip_accents": True}
    },
    "said_by_the_model": {"config": {"tokenizer_class": "BertTokenizer"}},
    "beside_another": {"tokenizer_config__json": {"tokenizer_class": "BertTokenizer"}, "spm__model": "not what it reads"},
}


@pytest.mark.parametrize("case", WORD_PIECE)
def test_word_pieces(case: str, tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", vocab__txt=WORDS, **WORD_PIECE[case])
    chains = [["huggingface"], ["deberta_dist", "huggingface"], ["official", "huggingface"]]
    for targets in chains if case == "said_by_the_model" else chains[:1]:
        at = source
        for number, to in enumerate(targets):
            target = tmp_path / f"{'-'.join(targets)}-{number}"
            report = convert(at, target, to=to)
            assert (target / "vocab.txt").read_text() == WORDS and "vocab.txt" in report["tokenizer"]["files"]
            assert ("training here reads SentencePiece" in report["tokenizer"]["message"]) == (to != "huggingface")
            at = target
        same_ids(source, at)
    unknown = loaded(at)("the time hello")["input_ids"].count(1)
    assert unknown == 0
    assert str(tmp_path) not in json.dumps(report)
    assert load_masked_lm(source)[1] is None


def test_a_vocabulary_that_its_class_does_not_read(spm: Path, tmp_path: Path) -> None:
    alone = convert(source_of(tmp_path / "alone", vocab__txt=WORDS), tmp_path / "a", to="huggingface")
    assert (
        "DebertaV2Tokenizer cannot be loaded: spm.model (or tokenizer.json) is not in the source"
        in alone["tokenizer"]["message"]
    )
    assert (tmp_path / "a/vocab.txt").exists()
    # The class of the model takes spm.model; the other goes along.
    both = source_of(tmp_path / "both", vocab__txt=WORDS, spm__model=spm)
    report = convert(both, tmp_path / "b", to="huggingface")
    assert "Carried as they were: vocab.txt" in report["tokenizer"]["message"]
    same_ids(both, tmp_path / "b")
    assert missing_files("DebertaTokenizer", {"vocab.json"}).startswith("DebertaTokenizer cannot be loaded: merges.txt")
    assert "some tokenizers of BertJapaneseTokenizer have" in missing_files("BertJapaneseTokenizer", {"vocab.txt"})
    assert missing_files("BertTokenizerFast", {"tokenizer.json"}) == missing_files("MineTokenizer", set()) == ""


@pytest.mark.parametrize("model", ["v1", "v1_with_key_biases"])
def test_the_tokenizer_of_v1_stays_its_own(model: str, tmp_path: Path) -> None:
    """A model with key biases goes to the classes of v2, which have another default."""
    trained = ByteLevelBPETokenizer()
    special = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]
    trained.train_from_iterator(["the time machine is a program of the file"] * 50, vocab_size=300, special_tokens=special)
    trained.save_model(str(tmp_path))
    source = source_of(
        tmp_path / "source", model=model, vocab__json=tmp_path / "vocab.json", merges__txt=tmp_path / "merges.txt"
    )
    convert(source, tmp_path / "direct", to="huggingface")
    same_ids(source, tmp_path / "direct")
    convert(source, tmp_path / "ours", to="deberta_dist")
    convert(tmp_path / "ours", tmp_path / "back", to="huggingface")
    same_ids(source, tmp_path / "back")


def test_sentencepiece_of_other_makes(lines: list[str], tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines[:2000]), model_prefix=str(tmp_path / "other"), vocab_size=300, pad_id=0, unk_id=1, bos_id=2,
        eos_id=3, pad_piece="<pad>", unk_piece="<unk>", bos_piece="[CLS]", eos_piece="[SEP]", minloglevel=9,
    )  # fmt: skip
    other = tmp_path / "other.model"
    for name, files in {
        "albert": {"spiece__model": other, "tokenizer_config__json": {"tokenizer_class": "AlbertTokenizer"}},
        "spm": {"spm__model": other},
    }.items():
        source = source_of(tmp_path / name, **files)
        report = convert(source, tmp_path / f"{name}-hf", to="huggingface")
        same_ids(source, tmp_path / f"{name}-hf")
    assert "spm.model begins with <pad> <unk>" in report["tokenizer"]["message"]


def test_what_its_configuration_names_goes_along(spm: Path, tmp_path: Path) -> None:
    config = {"auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", None]}, "mecab_kwargs": {"dic": "user.dic"}}
    source = source_of(
        tmp_path / "source", spm__model=spm, tokenizer_config__json=config, chat_template__jinja="x", user__dic="x",
        tokenization_mine__py="x", other__py="x",
    )  # fmt: skip
    for to in ("huggingface", "official"):
        convert(source, tmp_path / to, to=to)
        names = {path.name for path in (tmp_path / to).iterdir()}
        assert {"chat_template.jinja", "user.dic", "tokenization_mine.py", "spm.model"} <= names and "other.py" not in names


def token(content: str, **flags: bool) -> dict[str, Any]:
    return {
        "content": content,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "single_word": False,
        "special": True,
    } | flags


MASK_AND_USER = {"500": token("[MASK]"), "501": token("<User>", normalized=True, special=False)}
SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "lower": {"tokenizer_config": {"do_lower_case": True, "model_max_length": 77, "vocab_type": "spm"}},
    "punctuation": {"tokenizer_config": {"split_by_punct": True}},
    "both": {"tokenizer_config": {"split_by_punct": True, "do_lower_case": True}},
    "no_prefix": {"tokenizer_config": {"add_prefix_space": False}},
    "added": {"added_tokens": {"[MASK]": 500, "<user>": 501}},
    "added_and_roles": {
        "added_tokens": {"[MASK]": 500, "<user>": 501},
        "special_tokens_map": {"mask_token": token("[MASK]"), "cls_token": "[CLS]"},
    },
    "numbered": {"tokenizer_config": {"added_tokens_decoder": MASK_AND_USER, "do_lower_case": True}},
    "extra": {"tokenizer_config": {"additional_special_tokens": ["<user>"]}},
    "mask": {"special_tokens_map": {"mask_token": token("<user>", lstrip=True)}},
    "other_roles": {"tokenizer_config": {"cls_token": "<s>", "sep_token": "</s>"}},
}


NEAR_COPIES = ("none", "punctuation", "added", "extra")


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case in NEAR_COPIES)) for case in SETTINGS])
def test_settings_stand_in_what_is_written_anew(case: str, spm: Path, tmp_path: Path) -> None:
    files = {f"{name}__json": content for name, content in SETTINGS[case].items()}
    source = source_of(tmp_path / "source", spm__model=spm, **files)
    report = convert(source, tmp_path / "hf", to="huggingface")
    same_ids(source, tmp_path / "hf")
    assert report["tokenizer"]["compared"] and len(report["tokenizer"]["differences"]) == 1
    assert ("does what the source's files say" in report["tokenizer"]["message"]) == (case != "none")
    if case == "lower":
        assert loaded(tmp_path / "hf").model_max_length == 77
        # The user's word for the vocabulary is none about case.
        convert(source, tmp_path / "given", to="huggingface", tokenizer_path=spm)
        same_ids(source, tmp_path / "given")
        told = convert(source, tmp_path / "ours", to="deberta_dist")["tokenizer"]["message"]
        assert "What reads `spm.model` alone does not do what the source says: do_lower_case = true" in told
        convert(tmp_path / "ours", tmp_path / "back", to="huggingface")
        same_ids(source, tmp_path / "back")
        shown = call("fill_mask.py", source, "a [MASK]", "--top", 1, cwd=tmp_path)
        assert shown.returncode == 0 and "warning: the tokenizer's files of" in shown.stderr


def test_settings_that_cannot_stand_there_are_named(spm: Path, tmp_path: Path) -> None:
    source = source_of(
        tmp_path / "source", spm__model=spm,
        tokenizer_config__json={"strip_accents": True, "tokenize_chinese_chars": True, "sp_model_kwargs": {"enable_sampling": True}},
        special_tokens_map__json={"additional_special_tokens": ["<lost>"]},
        added_tokens__json={"[MASK]": 500, "<user>": 505} | {f"<{i}>": 510 + i for i in range(12)},
    )  # fmt: skip
    told = convert(source, tmp_path / "hf", to="huggingface")["tokenizer"]["message"]
    same_ids(source, tmp_path / "hf")
    for words in (
        "strip_accents = True", "tokenize_chinese_chars = True", "sp_model_kwargs = {'enable_sampling': True}", "<lost>, to which no file",
        "<user> has the id 501 there as in Hugging Face's class, and 505", "The model has no rows for <10>, <11>: its vocab_size is 512",
    ):  # fmt: skip
        assert words in told


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer_config", {"do_lower_case": "yes"}, "do_lower_case = 'yes' is neither true nor false"),
        ("tokenizer_config", {"mask_token": 5}, "'5' is not a token"),
        ("tokenizer_config", {"added_tokens_decoder": {"x": token("a")}}, "x: not all of these are numbers"),
        ("tokenizer_config", {"added_tokens_decoder": {"1": {"content": "a", "lstrip": 1}}}, "a flag that is neither"),
        ("tokenizer_config", {"extra_special_tokens": 5}, "is not a list of tokens"),
        ("tokenizer_config", "{", "tokenizer_config.json"),
        ("special_tokens_map", {"cls_token": {"text": "x"}}, "is not a token"),
        ("added_tokens", {"<user>": "y"}, "numbers of added tokens"),
        ("added_tokens", {"a": 5, "b": 5}, "two tokens have one number"),
    ],
)
def test_damaged_settings_are_refused(name: str, content: Any, words: str, spm: Path, tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", spm__model=spm, **{f"{name}__json": content})
    with pytest.raises(CheckpointError, match=words) as refusal:
        convert(source, tmp_path / "hf", to="huggingface")
    assert f"{name}.json" in str(refusal.value) and "\n" not in str(refusal.value) and not (tmp_path / "hf").exists()
