"""What lies in place of a file, told from its first bytes."""

import pytest

from deberta_dist.errors import DebertaDistError
from deberta_dist.files.foreign import format_name, refuse_stand_in, stand_in
from deberta_dist.files.strict_json import json_integer

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a" * 16 + b"\nsize 1234567\n"


def test_what_is_no_pointer() -> None:
    assert stand_in(b"version https://example.org/spec/v1\n") is None
    assert stand_in(b"/annex/objects/ is where git-annex keeps files.\nAnd more of that.\n") is None
    assert stand_in(b"") is None
    assert "git annex get" in (stand_in(b"../.git/annex/objects/Xx/9f/SHA256E-s1--0/SHA256E-s1--0") or "")
    assert "git lfs pull" in (stand_in(b"version https://hawser.github.com/spec/v1\r\noid sha256:00\r\n") or "")

    class OtherError(DebertaDistError):
        pass

    with pytest.raises(OtherError, match="^x is a Git LFS pointer"):
        refuse_stand_in(POINTER, "x", error=OtherError)


def test_formats() -> None:
    assert format_name(b"\x10\0\0\0\0\0\0\0" + b'{"a":{}}') == "a safetensors file"
    assert format_name(b"\xff\xff\xff\xff\x10\1\0\0") == "an Arrow stream, such as a data set saved by the datasets library"
    for text in (b"", b"PK is a place", b"plain text", b"\x80", b"{}", b"\xff\xff\xff\xff"):
        assert format_name(text) is None


def test_integers_of_any_length() -> None:
    assert json_integer("-12") == -12
    assert json_integer("7" * 5000) == "7" * 5000
