"""Where the two spans of a WSC row stand in its text, faults of the released data included.

``span_index`` counts words of ``text.split()``. In the official files the words at it are others than ``span_text``
in 3 rows of train, 1 of val and 10 of test, even without case and punctuation: "Dad" for "Dad's", spans that are not
contiguous, a wrong index.
"""

import re
import string
from collections.abc import Sequence

_PUNCTUATION = string.punctuation + "\u2018\u2019\u201c\u201d\u2014"

AT_INDEX, ELSEWHERE, INDEX_ALONE = "at its index", "elsewhere in the text", "nowhere: the word at its index is taken"


def find_span(text: str, span: str, index: int) -> tuple[int, int, str]:
    """Characters of a span.

    Args:
        text: Of the row.
        span: Words of the span.
        index: Of its first word in ``text.split()``.

    Returns:
        (first character, character after the last, how it was found): at its index, compared without case and
        punctuation, a genitive included; else where its words stand nearest to the index; else the one word at the
        index.
    """
    words = list(re.finditer(r"\S+", text))
    wanted = [_bare(word) for word in span.split()]
    found = [_bare(match.group()) for match in words]
    places = [i for i in range(len(words) - len(wanted) + 1) if wanted and _agree(found[i : i + len(wanted)], wanted)]
    if not places:
        return words[index].start(), words[index].end(), INDEX_ALONE
    start = min(places, key=lambda place: abs(place - index))
    how = AT_INDEX if start == index else ELSEWHERE
    return words[start].start(), words[start + len(wanted) - 1].end(), how


def _agree(found: Sequence[str], wanted: Sequence[str]) -> bool:
    *firsts, last = zip(found, wanted, strict=True)
    return all(a == b for a, b in firsts) and last[0] in (last[1], f"{last[1]}'s", f"{last[1]}s")


def _bare(word: str) -> str:
    return word.lower().replace("\u2019", "'").strip(_PUNCTUATION)
