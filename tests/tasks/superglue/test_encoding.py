"""Rows as sequences: every task decoded back to text, windows, cuts that keep what the label depends on."""

import json
from pathlib import Path

import numpy as np
import pytest

from deberta_dist.data.tokenizer import Tokenizer, train_tokenizer
from deberta_dist.errors import DataError
from deberta_dist.preparation.reading.texts import read_texts
from deberta_dist.tasks.base import Features, Head, Release, encode_split
from deberta_dist.tasks.encoding import KEPT_CUT, SequenceLengths, TextPart, encode_spans, window_starts
from deberta_dist.tasks.superglue.benchmark import SUPERGLUE
from deberta_dist.tasks.superglue.tasks import TASKS
from deberta_dist.tasks.superglue.wsc import AT_INDEX, ELSEWHERE, INDEX_ALONE, find_span

ROOT = Path(__file__).parents[3]
DEMO = Release(ROOT / "launchers" / "demo_superglue", SUPERGLUE)
WIDE = SequenceLengths(max_seq_length=512, window_overlap=64, max_windows=4)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Of the demo's text, with the marks of WiC and WSC in its vocabulary."""
    path = tmp_path_factory.mktemp("tokenizer") / "spm.model"
    texts = [*read_texts([ROOT / "launchers" / "demo_text" / "valid.jsonl"]), "* # " * 2000]
    train_tokenizer(texts, path, vocab_size=1500)
    return Tokenizer(path)


def encoded(task: str, split: str, tokenizer: Tokenizer, lengths: SequenceLengths = WIDE) -> Features:
    return encode_split(DEMO.read(TASKS[task], split), tokenizer, lengths)


def squeezed(text: str) -> str:
    return "".join(text.split())


def same(tokenizer: Tokenizer, text: str) -> str:
    """A text as it comes back from this vocabulary, without spaces."""
    return squeezed(tokenizer.decode(tokenizer.encode(text)))


def whole(features: Features, tokenizer: Tokenizer, number: int, choice: int = 0) -> str:
    (ids,) = features.sequences(features.examples[number], choice)
    return squeezed(tokenizer.decode(ids))


def expected_text(task: str, row: dict, choice: int) -> list[str]:
    """Segments of a row as the tasks' files have them, written anew."""
    match task:
        case "BoolQ":
            return [row["passage"], row["question"]]
        case "CB" | "RTE" | "AX-g":
            return [row["premise"], row["hypothesis"]]
        case "AX-b":
            return [row["sentence1"], row["sentence2"]]
        case "COPA":
            word = "because" if row["question"] == "cause" else "so"
            return [row["premise"], f"{word} {row['choice1'] if choice == 0 else row['choice2']}"]
        case "WiC":
            a, b = ((row[f"sentence{i}"], row[f"start{i}"], row[f"end{i}"]) for i in (1, 2))
            return [f"{s[:start]} * {s[start:end]} * {s[end:]}" for s, start, end in (a, b)]
    raise AssertionError(task)


@pytest.mark.parametrize("task", ["BoolQ", "CB", "RTE", "COPA", "WiC", "AX-b", "AX-g"])
def test_rows_decode_back_to_their_text(task: str, tokenizer: Tokenizer) -> None:
    split = "test" if TASKS[task].is_diagnostic else "train"
    features = encoded(task, split, tokenizer)
    by_key = {int(row["idx"]): row for row in features.split.rows}
    assert [example.key for example in features.examples] == sorted(features.split.decisions)
    for number, example in list(enumerate(features.examples))[:40]:
        row = by_key[example.key[0]]
        assert len(example.seconds) == (2 if task == "COPA" else 1)
        for choice in range(len(example.seconds)):
            first, second = (same(tokenizer, text) for text in expected_text(task, row, choice))
            assert whole(features, tokenizer, number, choice) == f"[CLS]{first}[SEP]{second}[SEP]"
        labels = TASKS[task].labels
        assert [labels[i] for i in example.gold] == list(features.split.decisions[example.key].gold)


def test_wsc_marks_noun_and_pronoun_by_index(tokenizer: Tokenizer) -> None:
    features = encoded("WSC", "train", tokenizer)
    by_key = {row["idx"]: row for row in features.split.rows}
    seen = 0
    for number, example in list(enumerate(features.examples))[:60]:
        row = by_key[example.key[0]]
        text = whole(features, tokenizer, number)
        words, target = row["text"].split(), row["target"]
        pronoun = same(tokenizer, f"# {words[target['span2_index']]} #")
        assert pronoun in text, row
        noun = same(tokenizer, target["span1_text"])
        assert text.endswith(f"[SEP]{noun}[SEP]") and text.count("*") == 2
        seen += squeezed(f"*{target['span1_text']}*") in text
    assert seen > 40, "the noun between its marks"


def test_multirc_has_one_sequence_per_answer(tokenizer: Tokenizer) -> None:
    features = encoded("MultiRC", "val", tokenizer)
    number = 0
    for row in sorted(features.split.rows, key=lambda row: row["idx"]):
        passage = same(tokenizer, row["passage"]["text"])
        for question in row["passage"]["questions"]:
            for answer in question["answers"]:
                example = features.examples[number]
                assert example.key == (row["idx"], question["idx"], answer["idx"])
                assert example.gold == (answer["label"],)
                both = same(tokenizer, question["question"]) + same(tokenizer, answer["text"])
                assert whole(features, tokenizer, number) == f"[CLS]{passage}[SEP]{both}[SEP]"
                number += 1
    assert number == len(features.examples)


def test_record_puts_every_candidate_once_in_the_place_of_the_placeholder(tokenizer: Tokenizer) -> None:
    features = encoded("ReCoRD", "train", tokenizer)
    queries = {q["idx"]: (q, row) for row in features.split.rows for q in row["qas"]}
    for number, example in enumerate(features.examples):
        query, row = queries[example.key[0]]
        candidates = features.split.decisions[example.key].labels
        assert len(set(candidates)) == len(candidates) == len(example.seconds)
        passage = same(tokenizer, row["passage"]["text"].replace("@highlight", " "))
        for choice, candidate in enumerate(candidates):
            filled = same(tokenizer, query["query"].replace("@placeholder", f" {candidate} "))
            assert whole(features, tokenizer, number, choice) == f"[CLS]{passage}[SEP]{filled}[SEP]"
        right = {answer["text"] for answer in query["answers"]}
        assert {candidates[i] for i in example.gold} == right


def test_long_passages_become_windows_that_cover_them(tokenizer: Tokenizer) -> None:
    lengths = SequenceLengths(max_seq_length=64, window_overlap=16, max_windows=50)
    features = encoded("BoolQ", "val", tokenizer, lengths)
    for example in features.examples:
        windows = features.sequences(example, 0)
        tail = [tokenizer.sep_id, *example.seconds[0], tokenizer.sep_id]
        covered = 0
        for ids in windows:
            assert len(ids) <= 64 and ids[0] == tokenizer.cls_id and ids[-len(tail) :].tolist() == tail
            body = ids[1 : -len(tail)]
            # A short one may be the same as an earlier place: it is the last of those that leave no gap.
            places = [i for i in range(covered + 1) if np.array_equal(example.first[i : i + len(body)], body)]
            covered = places[-1] + len(body)
        assert covered == len(example.first)
    several = sum(len(features.sequences(example, 0)) > 1 for example in features.examples)
    assert f"BoolQ val: several windows in {several} of {len(features.examples)}" in features.notes


@pytest.mark.parametrize("length", [0, 1, 10, 11, 25, 26, 27, 500])
def test_windows_overlap_and_end_at_the_end(length: int) -> None:
    starts = window_starts(length, room=10, overlap=3, most=1000)
    assert starts[0] == 0 and (length <= 10) == (len(starts) == 1)
    assert length <= 10 or starts[-1] + 10 == length
    assert all(0 < b - a <= 7 for a, b in zip(starts, starts[1:], strict=False))
    few = window_starts(length, room=10, overlap=3, most=4)
    assert len(few) == min(4, len(starts)) and few[0] == 0 and few[-1] == (starts[-1] if len(few) > 1 else 0)


def test_cutting_keeps_marked_words_and_their_neighbours(tokenizer: Tokenizer) -> None:
    parts = [TextPart("one two three " * 30), TextPart("* bank *", is_kept=True), TextPart("four five six " * 30)]
    ids, how = encode_spans(tokenizer, parts, limit=20)
    kept = tokenizer.encode("* bank *")
    text = ids.tolist()
    assert len(text) == 20 and how != KEPT_CUT
    place = next(i for i in range(20) if text[i : i + len(kept)] == kept)
    assert abs(place - (20 - len(kept)) / 2) <= 1, "context on both sides"
    assert encode_spans(tokenizer, [TextPart("a b c d e f g h", is_kept=True)], limit=3)[1] == KEPT_CUT
    assert (
        encode_spans(tokenizer, [TextPart("a b c d e f g h")], limit=3)[0].tolist() == tokenizer.encode("a b c d e f g h")[:3]
    )


@pytest.mark.parametrize("task", list(TASKS))
def test_nothing_is_too_long_and_cuts_are_counted(task: str, tokenizer: Tokenizer) -> None:
    split = "test" if TASKS[task].is_diagnostic else "train"
    features = encoded(task, split, tokenizer, SequenceLengths(max_seq_length=24, window_overlap=6, max_windows=2))
    count = 0
    for example in features.examples:
        for choice in range(len(example.seconds)):
            windows = features.sequences(example, choice)
            count += len(windows)
            assert 1 <= len(windows) <= 2 and max(map(len, windows)) <= 24
    assert count and features.notes, "at 24 tokens something was cut, and is told"
    assert all(f"of {len(features.examples):,}" in note for note in features.notes)


@pytest.mark.parametrize(
    ("text", "span", "index", "found", "how"),
    [
        ("Ann saw Dad's boss and he left.", "Dad", 2, "Dad's", AT_INDEX),
        ("The dog bit the dog again.", "the dog", 3, "the dog", AT_INDEX),
        ("The dog bit the dog again.", "The Dog", 0, "The dog", AT_INDEX),
        ("The dog bit the cat again.", "the cat", 1, "the cat", ELSEWHERE),
        ("Tom, who knew Ann, left.", "Tom and Ann", 0, "Tom,", INDEX_ALONE),
        ("He left \u201cthe  house\u201d early.", "the house", 2, "\u201cthe  house\u201d", AT_INDEX),
    ],
)
def test_wsc_spans_with_the_faults_of_the_release(text: str, span: str, index: int, found: str, how: str) -> None:
    start, end, way = find_span(text, span, index)
    assert (text[start:end], way) == (found, how)


def test_a_passage_without_entities_and_a_query_without_placeholder_are_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [json.loads(line) for line in (DEMO.path / "ReCoRD" / "test.jsonl").read_text().splitlines()]
    for field, change, words in (
        ("entities", lambda row: row["passage"].update(entities=[]), "no entity"),
        ("query", lambda row: row["qas"][0].update(query="Nobody here"), "no @placeholder"),
    ):
        folder = tmp_path / field / "ReCoRD"
        folder.mkdir(parents=True)
        broken = json.loads(json.dumps(rows))
        change(broken[1])
        (folder / "test.jsonl").write_text("\n".join(map(json.dumps, broken)))
        split = Release(folder.parent, SUPERGLUE).read(TASKS["ReCoRD"], "test")
        with pytest.raises(DataError, match=f"test.jsonl, line 2: query .* has {words}"):
            encode_split(split, tokenizer, WIDE)


def test_outputs() -> None:
    assert {name: task.num_outputs for name, task in TASKS.items()} == {
        "BoolQ": 2, "CB": 3, "COPA": 1, "MultiRC": 2, "ReCoRD": 1, "RTE": 2, "WiC": 2, "WSC": 2, "AX-b": 2, "AX-g": 2
    }  # fmt: skip
    assert [name for name, task in TASKS.items() if task.head is Head.CHOICE] == ["COPA", "ReCoRD"]
