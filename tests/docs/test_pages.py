"""Every page of the docs: links lead somewhere, commands exist with the flags that they are given, numbers are quoted.

Nothing here runs a command of a page; ``--help`` of each tool is asked for its flags, once.
"""

import contextlib
import functools
import io
import re
import runpy
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from deberta_dist.config.finetune import FineTuneConfig
from deberta_dist.config.schema import RunConfig
from deberta_dist.config.section import Section
from deberta_dist.finetuning.arguments import usage
from deberta_dist.tasks.registry import DEFAULT
from tests.docs.markdown import PAGES, ROOT, Command, anchors, code, commands, links

MAX_README_LINES = 180
# A verb and the file in tools/ that is the same program, where there is one.
VERBS: dict[str, str | None] = {
    "convert": "convert_checkpoint",
    "inspect": "inspect_checkpoint",
    "fill-mask": "fill_mask",
    "plan": "plan_layout",
    "report": "report_scores",
    "make-submission": "make_submission",
    "train-tokenizer": "train_tokenizer",
    "prepare-corpus": "prepare_corpus",
    "inspect-corpus": "inspect_corpus",
    "convert-corpus": "convert_corpus",
    "calibrate": None,
    "init": None,
}
# Verbs that become DeepSpeed's launcher, and a launcher that takes the same flags.
STARTS = {"pretrain": "pretrain_1.5b", "finetune": "finetune_superglue"}
# What pages may start beside the package's own programs; nothing of these is checked but that the page means them.
SHELL_WORDS = {".", "export", "pip", "cd", "rm", "mkdir"}
# Files that a page tells the reader to make.
TO_BE_MADE = {"launchers/mine.toml"}
DEEPSPEED_FLAGS = {"--hostfile", "--num_nodes", "--num_gpus", "--launcher"}
PAGE_NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]

ALL_COMMANDS = [command for page in PAGES for command in commands(page)]


def flags_in(text: str) -> set[str]:
    """Everything in a help text that looks like a flag."""
    return set(re.findall(r"(?<![\w-])--[a-z][\w.-]*", text))


@functools.cache
def help_of(*words: str) -> str:
    """What a program of this checkout prints for ``--help``; it runs in this process, which has most imports already."""
    # A program sets a handler of its own for its process.
    printed, before, handler = io.StringIO(), (sys.argv, list(sys.path)), signal.getsignal(signal.SIGTERM)
    sys.argv = [*words, "--help"]
    try:
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as end:
            if words[0] == "-m":
                sys.argv = [*words[1:], "--help"]
                runpy.run_module(words[1], run_name="__main__")
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = before
        signal.signal(signal.SIGTERM, handler)
    assert end.value.code in (0, None), f"{' '.join(words)} --help ends with {end.value.code}"
    return printed.getvalue()


@functools.cache
def flags_of(*words: str) -> set[str]:
    """Flags of a program. A measurement imports what it measures, so its flags are read off its source."""
    if words[0] == "tools/benchmark.py":
        verb = (ROOT / f"benchmarks/{words[1]}.py").read_text(encoding="utf-8")
        shared = re.findall(r"^from ([\w.]+) import .*add_\w+_arguments?\b", verb, re.M)
        sources = [ROOT / words[0], ROOT / f"benchmarks/{words[1]}.py"]
        sources += [ROOT / f"{module.replace('.', '/')}.py" for module in shared]
        return {flag for source in sources for flag in re.findall(r'"(--[a-z][\w-]*)"', source.read_text(encoding="utf-8"))}
    return flags_in(help_of(*words))


def program(words: tuple[str, ...]) -> tuple[str, ...] | None:
    """The start of Python behind a command of a page, without its own arguments; None where it is no tool."""
    if words[0] == "deberta-dist":
        verb = words[1] if len(words) > 1 and not words[1].startswith("-") else None
        if verb is None or verb in STARTS:
            return None
        assert verb in VERBS, f"deberta-dist {verb}: no such verb"
        if (ROOT / "deberta_dist/__main__.py").exists():
            return ("-m", "deberta_dist", verb)
        return (f"tools/{VERBS[verb]}.py",) if VERBS[verb] else None
    if words[0] == "python" and words[1] == "tools/benchmark.py":
        return words[1:3]
    if words[0] == "python" and words[1].endswith(".py"):
        return words[1:2]
    return None


def unwrapped(words: tuple[str, ...]) -> tuple[str, ...]:
    """A command without assignments before it, and without mpirun."""
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if words[0] == "mpirun":
        start = next(i for i, word in enumerate(words) if word in ("deberta-dist", "python"))
        return words[start:]
    return words


def configuration_keys(model: type[Section], *, open_sections: tuple[str, ...] = ()) -> set[str]:
    """``--section.key`` of every key of a TOML; a section that takes further keys ends with a dot and a star."""
    keys = set()
    for section, field in model.model_fields.items():
        assert isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        keys |= {f"--{section}.{key}" for key in field.annotation.model_fields}
    return keys | {f"--{section}.*" for section in open_sections}


def launcher_flags(name: str) -> set[str]:
    """Flags that a launcher and DeepSpeed's launcher before it take."""
    if name in ("pretrain_1.5b", "pretrain_demo", "demo"):
        return DEEPSPEED_FLAGS | {"--dry-run", "--world-size", "--quiet"} | configuration_keys(RunConfig)
    if name == "finetune_superglue":
        return DEEPSPEED_FLAGS | flags_in(usage(DEFAULT)) | configuration_keys(FineTuneConfig)
    if name == "benchmark_gpu":
        return set(re.findall(r'"(--[a-z][\w-]*)"', (ROOT / "benchmarks/gpu.py").read_text(encoding="utf-8")))
    script = {"run": "tests/run.sh", "setup_env": "launchers/setup_env.sh"}.get(name)
    return flags_in((ROOT / script).read_text(encoding="utf-8")) if script else set()


def wrong_with(words: tuple[str, ...]) -> list[str]:
    """What is wrong with a command of a page."""
    words = unwrapped(words)
    given = {word.partition("=")[0] for word in words[1:] if word.startswith("--") and word != "--"}
    if words[0] in SHELL_WORDS:
        return wrong_extras(words)
    if words[0] in ("sh", "bash", "deepspeed"):
        scripts = [word for word in words[1:] if word.endswith(".sh")]
        if len(scripts) != 1:
            return [f"{words[0]} starts {scripts}"]
        if scripts[0] in TO_BE_MADE:
            return []
        if not (ROOT / scripts[0]).is_file():
            return [f"{scripts[0]} is not there"]
        name = Path(scripts[0]).stem
        known = launcher_flags(name)
        return [
            f"{scripts[0]} has no {flag}"
            for flag in sorted(given - known - {"--help"})
            if not flag.startswith("--data.sources.")
        ]
    if words[0] == "deberta-dist" or (words[0] == "python" and words[1].endswith(".py")):
        if words[0] == "python" and not (ROOT / words[1]).is_file():
            return [f"{words[1]} is not there"]
        start = program(words)
        known = flags_of(*start) if start else launcher_flags(STARTS[words[1]]) if words[1] in STARTS else {"--version"}
        overrides = configuration_keys(RunConfig) if start and "plan" in " ".join(start) else set()
        return [f"{' '.join(words[:2])} has no {flag}" for flag in sorted(given - known - overrides - {"--help"})]
    return [f"{words[0]} is no program that pages may start"]


def wrong_extras(words: tuple[str, ...]) -> list[str]:
    """Extras of ``pip install .[EXTRA,...]`` that pyproject.toml does not have."""
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"])
    named = {
        name for word in words if (match := re.fullmatch(r"(?:\.|deberta_dist)\[(.+)\]", word)) for name in match[1].split(",")
    }
    return [f"pyproject.toml has no extra {name}" for name in sorted(named - extras)]


def broken_links(text: str, folder: Path) -> list[str]:
    """Links of a page to files or headings that are not there."""
    found = []
    for target in links(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (folder / path).resolve()
        if path and not file.exists():
            found.append(f"{target}: no such file")
        elif anchor and anchor not in anchors(file.read_text(encoding="utf-8") if path else text):
            found.append(f"{target}: no such heading")
    return found


def missing_files(text: str) -> list[str]:
    """Files of the repository that a page names in code and that are not there."""
    named = {
        word.rstrip("/")
        for word in code(text)
        if re.fullmatch(r"(deberta_dist|launchers|tests|tools|ds_configs|benchmarks|docs)/[\w./-]+", word)
    }
    return sorted(name for name in named - TO_BE_MADE if not (ROOT / name).exists())


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_links_and_files(name: str) -> None:
    page = ROOT / name
    text = page.read_text(encoding="utf-8")
    assert broken_links(text, page.parent) == []
    assert missing_files(text) == []


@pytest.mark.parametrize("command", ALL_COMMANDS, ids=lambda c: f"{c.page}:{c.line}")
def test_commands(command: Command) -> None:
    assert wrong_with(command.words) == []


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_commands_in_lines(name: str) -> None:
    """``deberta-dist VERB`` and ``python tools/...`` in the middle of a sentence exist as well."""
    text = (ROOT / name).read_text(encoding="utf-8")
    # A result says what was run then.
    text = re.sub(r"<!-- result .*?<!-- end -->", "", text, flags=re.DOTALL)
    for words in (tuple(word.split()) for word in code(text)):
        if words[:1] == ("deberta-dist",) and words[1:2] not in ((), ("VERB",)):
            assert wrong_with(words) == []
        if words[:1] == ("python",) and len(words) > 1 and words[1].startswith("tools/") and words[1] != "tools/NAME.py":
            assert wrong_with(words) == []


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MAX_README_LINES


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {target.partition("#")[0] for target in links((ROOT / "README.md").read_text(encoding="utf-8"))}
    assert {page.relative_to(ROOT).as_posix() for page in ROOT.glob("docs/*.md")} <= linked


@pytest.mark.parametrize("script", ["benchmarks/quote.py", "docs/generate_configuration.py"])
def test_generated_text_is_up_to_date(script: str) -> None:
    """Numbers are those of benchmarks/results/, keys those of the schema."""
    ran = subprocess.run([sys.executable, script, "--check"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_every_result_is_quoted() -> None:
    quoted = {name for page in PAGES for name in re.findall(r"<!-- result (\w+)", page.read_text(encoding="utf-8"))}
    assert {path.stem for path in (ROOT / "benchmarks/results").glob("*.json")} <= quoted


def test_the_command_line_knows_the_same_verbs() -> None:
    known = {path.stem.replace("_", "-") for path in (ROOT / "deberta_dist/cli").glob("[a-z]*.py")}
    assert not known or {*VERBS, *STARTS} <= known
    assert all(name is None or (ROOT / f"tools/{name}.py").is_file() for name in VERBS.values())


class TestTheChecks:
    """Each check finds a planted fault."""

    def test_links(self) -> None:
        assert broken_links("[a](nowhere.md)", ROOT) == ["nowhere.md: no such file"]
        assert broken_links("[a](README.md#nothing)", ROOT) == ["README.md#nothing: no such heading"]
        assert broken_links("# A `[x]` heading\n[a](#a-x-heading) [b](README.md#licence) [c](https://example.org)", ROOT) == []
        assert missing_files("`deberta_dist/nowhere.py` and `deberta_dist/errors.py`") == ["deberta_dist/nowhere.py"]

    @pytest.mark.parametrize(
        "line",
        [
            "deepspeed launchers/pretrain_1.5b.sh --training.max_step 1000",
            "deepspeed launchers/finetune_superglue.sh --task all --lucky",
            "sh launchers/nowhere.sh",
            "deberta-dist convert a b --too huggingface",
            "python tools/nowhere.py",
            "pip install .[zst]",
            "curl example.org",
        ],
    )
    def test_commands(self, line: str) -> None:
        assert len(wrong_with(tuple(line.split()))) == 1

    def test_verbs(self) -> None:
        with pytest.raises(AssertionError, match="no such verb"):
            wrong_with(("deberta-dist", "transmogrify", "a"))
