"""The hash by which documents are equal and are held out: its definition, whatever shortcut it takes."""

import hashlib
import random
import string
import unicodedata

from deberta_dist.preparation.pipeline.encode import document_hash


def defined(text: str) -> bytes:
    """BLAKE2b-128 of the text after NFKC, case folding and removal of ASCII white space."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = "".join(character for character in folded if character not in string.whitespace)
    return hashlib.blake2b(kept.encode(), digest_size=16).digest()


def test_the_hash_is_as_defined_for_any_text() -> None:
    generator = random.Random(0)
    ascii_characters = "abcXYZ .,\n\t0"
    # Marks that join a letter, characters that fold to ASCII or to several, wide ones, and such as nothing changes.
    others = (
        "\u0301\u0327\u030a\u00e9\u00c9\u00df\u1e9e\u212a\u2026\u00a0\u3000\ufb01"
        "\u2019\u201c\u2014\u4e2d\uac00\u1100\u1161\U0001f600\u0130\u03a3\u03c2"
    )
    for _ in range(3000):
        size, share = generator.randrange(60), generator.choice((0.02, 0.1, 0.5, 1.0))
        pool = generator.sample(others, 3)
        text = "".join(generator.choice(pool if generator.random() < share else ascii_characters) for _ in range(size))
        assert document_hash(text.encode()) == defined(text), ascii(text)


def test_spelling_does_not_matter_and_letters_do() -> None:
    long = "some text around it that is plain " * 3
    for one, other in (
        ("\u00e9t\u00e9", "E\u0301te\u0301"),
        ("\ufb01ne", "Fi ne"),
        ("a\u00a0b", "A\n b"),
        ("stra\u00dfe", "STRASSE"),
    ):
        assert document_hash(f"{long}{one}".encode()) == document_hash(f"{long}{other}".encode())
    assert document_hash(f"{long}e\u0301".encode()) != document_hash(f"{long}e".encode())
