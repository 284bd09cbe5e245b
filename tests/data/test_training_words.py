"""Words are what white space separates; what has none for long is cut where it does least harm."""

import unicodedata

import pytest

from deberta_dist.data.training_words import count_words, cut_run

FAMILY = "\U0001f469\u200d\U0001f469\u200d\U0001f467"  # one emoji of five code points


def counted(*texts: str, limit: int = 40) -> tuple[dict[str, int], int, int]:
    words = count_words(texts, normalize=str.lower, max_run_characters=limit)
    return words.counts, words.num_cut_runs, words.num_cut_characters


def test_words_and_their_counts() -> None:
    assert counted("The cat\nthe\tdog\u3000The", "cat") == ({"the": 3, "cat": 2, "dog": 1}, 0, 0)
    assert counted("one\u2581two\u2585three") == ({"one": 1, "two": 1, "three": 1}, 0, 0)
    assert counted("", " \n ") == ({}, 0, 0)


def test_long_runs_are_cut_and_counted() -> None:
    counts, runs, characters = counted("-" * 100 + " a " + "x" * 40, "-" * 100)
    assert counts == {"-" * 40: 4, "-" * 20: 2, "a": 1, "x" * 40: 1}
    assert (runs, characters) == (2, 200)


@pytest.mark.parametrize(
    "run",
    ["e\u0301\u0327" * 200, FAMILY * 60, "\u0e40\u0e01\u0e49" * 99, "\u0915\u094d\u0937\u093f" * 70, "\u1112\u1161\u11ab" * 80,
     "\U0001f44d\U0001f3fd" * 90, "a" * 333, "\u0301" * 333, "\u4e2d\u6587" * 90],
    ids=["accents", "emoji", "Thai", "Devanagari", "Hangul", "skin tones", "letters", "marks alone", "Chinese"],
)  # fmt: skip
def test_no_character_is_taken_apart(run: str) -> None:
    parts = list(cut_run(run, max_characters=40))
    assert "".join(parts) == run and all(20 <= len(part) <= 40 for part in parts[:-1])
    if run.strip("\u0301"):
        for part in parts:
            assert unicodedata.category(part[0])[0] != "M" and part[0] not in "\u200d\u1161\u11ab\U0001f3fd"
            assert part[-1] not in "\u200d\u0e40\u094d"


def test_a_cut_comes_behind_a_mark_where_there_is_one() -> None:
    sentence = "\u4eca\u5929\u5929\u6c14\u5f88\u597d\u3002"
    assert set(cut_run(sentence * 30, max_characters=40)) == {sentence * 5}
    parts = list(cut_run("function(a){return-a};" * 40, max_characters=40))
    assert all(part[-1] in "(){}-;" for part in parts)
