"""One meaning or an error."""

from pathlib import Path

import pytest

from deberta_dist.errors import ConfigError, DataError
from deberta_dist.files.strict_json import LongInteger, StrictJson, loads, read_configuration


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "key given twice: c"),
        ("[NaN]", "NaN is not a JSON number"),
        ("[-Infinity]", "-Infinity is not a JSON number"),
        ("[1e400]", "1e400 is not a JSON number"),
        ("9" * 401, "has 401 digits"),
        ("[" * 100_000, "nested too deeply"),
        (r'"\ud800"', "surrogates not allowed"),
        (b'"\xff"', "can't decode byte 0xff"),
        ("{", "Expecting property name"),
    ],
)
def test_what_has_no_one_meaning_is_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loads(text)


def test_readers_that_pass_over_fields_take_any_number() -> None:
    digits = "9" * 5000
    assert loads(f"[1e400, {digits}, 7]", any_numbers=True) == [float("inf"), LongInteger(digits), 7]
    with pytest.raises(ValueError, match="not a JSON number"):
        loads("[NaN]", any_numbers=True)


def test_a_reader_raises_its_own_error() -> None:
    class OfItsOwn(DataError):
        pass

    reader = StrictJson(OfItsOwn)
    assert reader.parse(b'{"a": [1]}', file="f") == {"a": [1]}
    for check in (
        lambda: reader.parse(b"[]", file="f"),
        lambda: reader.fields({"a": 1}, keys=["b"], where="f"),
        lambda: reader.mapping([], where="f"),
        lambda: reader.sequence({}, where="f"),
        lambda: reader.integer(True, where="f"),
        lambda: reader.integer(2**63, where="f"),
        lambda: reader.string(1, where="f"),
    ):
        with pytest.raises(OfItsOwn, match="f"):
            check()


def test_files_of_settings(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\xef\xbb\xbf{}")
    assert read_configuration(path, shown="key") == "{}"
    for content, message in (
        (b" " * (2**20 + 1), "1048577 bytes are too many for a configuration"),
        (b"\xff", "not valid TOML: not UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    ):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            read_configuration(path, shown="key", kind="TOML")
    with pytest.raises(ConfigError, match="key: cannot be read .*; look elsewhere"):
        read_configuration(tmp_path / "none", shown="key", hint="; look elsewhere")
