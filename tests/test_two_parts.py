"""The tests' own runner: what runs beside what, and whose failure is the exit code."""

from pathlib import Path

import pytest

from tests import two_parts


def test_slow_tests_come_with_marks_alone() -> None:
    parsed, rest = two_parts.parse(["tests/config", "-k", "batch"])
    assert (parsed.marks, parsed.workers, rest) == ("not slow", 1, ["tests/config", "-k", "batch"])
    for words in (["-m", "slow"], ["-mslow"]):
        assert two_parts.parse(words)[0].marks == "slow"


@pytest.mark.parametrize(
    ("codes", "code"), [([0, 0], 0), ([0, 1], 1), ([1, 0], 1), ([5, 0], 0), ([0, 5], 0), ([5, 5], 5), ([5, 2], 2)]
)
def test_any_failure_is_the_exit_code(codes: list[int], code: int) -> None:
    assert two_parts.combined(codes) == code


def test_a_failure_of_the_first_part_does_not_hide_the_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def run(arguments: list[str], *, marks: str, junit: Path | None) -> int:
        started.append((arguments, marks))
        assert junit is not None
        junit.write_text(f'<testsuites><testsuite name="{len(started)}"/></testsuites>')
        return len(started) % 2

    monkeypatch.setattr(two_parts, "run_pytest", run)
    target = tmp_path / "all.xml"
    assert two_parts.main(["--workers", "2", f"--junitxml={target}", "tests/config"]) == 1
    spread = ["-n", "2", "--dist", "worksteal", "tests/config"]
    assert started == [(spread, "(not slow) and not serial"), (["tests/config"], "(not slow) and serial")]
    assert target.read_text().count("<testsuite ") == 2
