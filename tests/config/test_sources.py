"""Tables [data.sources.NAME]: paths, overrides, and refusals that name the source."""

from collections.abc import Callable
from pathlib import Path

import pytest

from deberta_dist.config import load_config
from deberta_dist.config.write import to_toml
from deberta_dist.errors import ConfigError

Spoil = Callable[[str, str], Path]
TRAIN = 'train = "train.tokens"\n'
WIKI = '[data.sources.wiki]\npath = "w"\n'
BOOKS = '[data.sources.books]\npath = "/b"\n'


@pytest.fixture
def toml(spoil: Spoil) -> Path:
    spoil(TRAIN, "")
    return spoil("[training]", f"{WIKI}proportion = 0.3\n{BOOKS}proportion = 7\n[training]")


def test_sources_are_read_overridden_and_written(toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sources = load_config(toml).data.sources
    assert {name: (source.path, source.proportion) for name, source in sources.items()} == {
        "wiki": (toml.parent / "w", 0.3), "books": (Path("/b"), 7.0)
    }  # fmt: skip
    given = ["--data.sources.wiki.path", "2024", "--data.sources.wiki.proportion=2", "--data.sources.web.path", "x",
             "--data.sources.web.proportion", "1"]  # fmt: skip
    config = load_config(toml, given)
    assert config.data.sources["wiki"].path == tmp_path / "2024" and config.data.sources["wiki"].proportion == 2
    assert list(config.data.sources) == ["wiki", "books", "web"] and config.data.train is None
    written = tmp_path / "again.toml"
    written.write_text(to_toml(config))
    assert load_config(written).data == config.data


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("proportion = 0.3", "", "data.sources.wiki needs exactly one of proportion and epochs; neither is given"),
        ("proportion = 0.3", "proportion = 1\nepochs = 1", "data.sources.wiki needs exactly one of proportion and epochs; both"),
        ("proportion = 0.3", "epochs = 2", "data.sources.books has a proportion and data.sources.wiki has epochs; all"),
        ("proportion = 0.3", "proportion = 0", "data.sources.wiki.proportion = 0; expected a number from 1e-06 to 1000000"),
        ("proportion = 0.3", "proportion = -1.5", "data.sources.wiki.proportion = -1.5; expected a number from 1e-06 to 1000000"),
        ("proportion = 0.3", "proportion = nan", "data.sources.wiki.proportion = nan; expected a number from 1e-06 to 1000000"),
        ("proportion = 0.3", "epochs = 0", "data.sources.wiki.epochs = 0; expected a number from 1e-06 to 1000000"),
        ('path = "w"', "", "data.sources.wiki.path is missing: A token file"),
        ("proportion = 0.3", "proporton = 0.3", "key data.sources.wiki.proporton; did you mean data.sources.NAME.proportion?"),
        ("[data.sources.wiki]", '[data.sources."wi ki"]', "data.sources.wi ki = 'wi ki'; expected String should match"),
        ("[data.sources.wiki]", "[data.sources]\nwiki = 3\n[data.sources.x]", "data.sources.wiki must be a table [data.sources.wiki]"),
        ("[data]", f"[data]\n{TRAIN}", "exactly one of data.train and tables [data.sources.NAME] is needed; both are given"),
    ],
)  # fmt: skip
def test_refused(toml: Path, spoil: Spoil, old: str, new: str, expected: str) -> None:
    spoil(old, new)
    with pytest.raises(ConfigError) as caught:
        load_config(toml)
    assert str(toml) in str(caught.value) and expected in str(caught.value)


def test_neither_is_refused_and_an_override_is_named(toml: Path, spoil: Spoil) -> None:
    with pytest.raises(ConfigError, match=r"^command line: data.sources.wiki.proportion = 'x'; expected a valid number"):
        load_config(toml, ["--data.sources.wiki.proportion", "x"])
    with pytest.raises(ConfigError, match=r"data.sources.wiki.path must be a table \[data.sources.wiki.path\]|not of the form"):
        load_config(toml, ["--data.sources.wiki.path.more", "x"])
    text = toml.read_text()
    toml.write_text(text[: text.index("[data.sources.wiki]")] + text[text.index("[training]") :])
    with pytest.raises(ConfigError, match=r"exactly one of data.train and tables .* is needed; neither is given"):
        load_config(toml)
