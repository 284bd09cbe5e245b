"""Hostfiles and placement flags: what DeepSpeed would stop at, or pass over without a word, is refused before a start."""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from deberta_dist.errors import ConfigError
from deberta_dist.training import entry, hostfile, launch
from tests.launchers.conftest import ROOT

DEMO = str(ROOT / "launchers" / "pretrain_demo.sh")
Write = Callable[[str], str]


@pytest.fixture
def hosts(tmp_path: Path) -> Write:
    """Writes a hostfile and gives its path."""

    def write(text: str) -> str:
        path = tmp_path / "hosts"
        path.write_bytes(text.encode("latin-1"))
        return str(path)

    return write


def check(*words: str) -> None:
    split = launch.split_arguments(words)
    hostfile.check_placement(split.value, split.names())


def test_read(hosts: Write) -> None:
    text = "# ours\n\n node1 slots=8\nnode2\tslots=4 # old\r\nuser@10.0.0.3  slots=16 max_slots=16\n"
    assert hostfile.read_hostfile(hosts(text)) == {"node1": 8, "node2": 4, "user@10.0.0.3": 16}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("node1\n", 'line 1: "node1"; expected NAME slots=NUMBER'),
        ("# x\nnode1 slots=2\nnode2 slots=\n", "line 3"),
        ("node1 slots=2\nnode1 slots=4\n", "line 2: node1 is listed twice"),
        ("node1 slots=0\n", "line 1: node1 has slots=0"),
        ("node1 slots=-2\n", "line 1"),
        ("node1 slots=2.5\n", "line 1"),
        ("node1 slots=two\n", "line 1"),
        ("node1 slots=" + "9" * 5000, "line 1"),
        ("node1:8\n", "line 1"),
        ("\xef\xbb\xbfnode1 slots=8\n", "line 1: a byte-order mark"),
        ("", "names no machine"),
        ("\n# nothing\n", "names no machine"),
        ("\xff\xfe\x00", "not a text file"),
    ],
)
def test_a_wrong_hostfile_is_refused(text: str, said: str, hosts: Write) -> None:
    path = hosts(text)
    with pytest.raises(ConfigError, match=said) as caught:
        check("--hostfile", path)
    assert path in str(caught.value) and len(str(caught.value)) < 400 + len(path)


@pytest.mark.parametrize("flag", [["--hostfile={}"], ["--hostfile", "{}"], ["-H", "{}"]])
@pytest.mark.parametrize("what", ["nowhere", "folder", ""])
def test_no_hostfile_where_one_is_named(flag: list[str], what: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    path = str(tmp_path / what) if what else ""
    with pytest.raises(ConfigError, match="does not exist|is no file"):
        check(*(word.format(path) for word in flag))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--num_nodes 3", "--num_nodes 3 is more than the 2"),
        ("--num_nodes 0", "expected a number from 1 on"),
        ("--num_nodes two", "expected a number from 1 on"),
        ("--num_gpus 8", "--num_gpus 8 is more than slots=4 of b"),
        ("--num_accelerators 9", "--num_gpus 9 is more than slots=8 of a"),
        ("--include a --exclude b", "cannot be given together"),
        ("--include a --num_gpus 2", "cannot be given together"),
        ("-e a --num_nodes 1", "cannot be given together"),
        ("--include c", "'c' names no machine"),
        ("--include a:8", "a has slots 0 to 7"),
        ("--include a:x", "expected NAME or NAME:SLOT"),
        ("-e a@b", "leaves no machine"),
        ("-e a:0,1,2,3,4,5,6,7@b", "leaves no machine"),
        ("--no_ssh", "needs --node_rank"),
        ("--no_ssh --node_rank 2", "0 to 1; got 2"),
        ("--no_ssh --node_rank 1 --num_nodes 1", "0 to 0; got 1"),
    ],
)
def test_placement_that_the_hostfile_does_not_have(words: str, said: str, hosts: Write) -> None:
    with pytest.raises(ConfigError, match=said):
        check("--hostfile", hosts("a slots=8\nb slots=4\n"), *words.split())


@pytest.mark.parametrize(
    "words",
    ["", "--num_nodes 2", "--num_nodes -1", "--num_nodes 1 --num_gpus 8", "--num_gpus 4", "-i a:0,7@b", "-e a:0@b:1", "-e b",
     "--no_ssh --node_rank 1", "--no_ssh -e a --node_rank 0"],
)  # fmt: skip
def test_placement_that_it_has(words: str, hosts: Write) -> None:
    check("--hostfile", hosts("a slots=8\nb slots=4\n"), *words.split())


def test_without_a_hostfile() -> None:
    check("--num_gpus", "8")
    check("--include", "localhost:0,3")
    with pytest.raises(ConfigError, match="--num_nodes 2 needs a --hostfile"):
        check("--num_nodes", "2")
    with pytest.raises(ConfigError, match="'node1' names no machine of this machine"):
        check("-i", "node1")


@pytest.mark.parametrize("alone", [[], ["--dry-run"]])
def test_refused_by_the_launcher(alone: list[str], start: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    result = start("sh", DEMO, "--hostfile", "/nowhere/hosts", *alone)
    assert result.returncode == 2 and result.stdout == ""
    assert "--hostfile /nowhere/hosts does not exist" in result.stderr and len(result.stderr.splitlines()) == 1


def above(*front: str, machines: str = "localhost") -> list[list[str]]:
    world = base64.urlsafe_b64encode(json.dumps({machines: [0, 1]}).encode()).decode()
    launcher = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}", "--master_port=29500", DEMO]
    return [["numactl", "x"], launcher, [sys.executable, *front], ["bash"]]


@pytest.mark.parametrize(
    "front",
    [("/v/bin/deepspeed", "--hostfile", "/nowhere/h", "x.sh"), ("/v/bin/ds", "--num_gpus", "2", "-H", "/nowhere/h", "x.sh"),
     ("-m", "deepspeed.launcher.runner", "--quiet", "--hostfile=/nowhere/h", "x.sh"), ("/v/bin/deepspeed", "--hostf=/nowhere/h", "x")],
)  # fmt: skip
def test_a_rank_finds_the_front(
    front: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hostfile, "_commands_above", lambda: above(*front))
    with pytest.raises(SystemExit) as caught:
        entry.start(lambda *_: pytest.fail("it ran"), Path(DEMO), [], help_text="", goes_on="")
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: command line: --hostfile /nowhere/h does not exist")


@pytest.mark.parametrize(
    "chain",
    [above("/v/bin/deepspeed", "x.sh", "--hostfile", "/nowhere/h"), above("/v/bin/deepspeed", "--launcher_args", "-H /nowhere", "x.sh"),
     above("/v/bin/deepspeed", "--hostfile", __file__, "x.sh"), above("/v/bin/deepspeed", "--hostfile", "/gone", "x.sh", machines="node1"),
     [["bash"]], [[]]],
)  # fmt: skip
def test_other_fronts_are_left_alone(chain: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostfile, "_commands_above", lambda: chain)
    hostfile.check_front(launch.FLAGS_WITH_VALUE)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_processes_above_are_read() -> None:
    code = "from deberta_dist.training import hostfile; print(list(hostfile._commands_above()))"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}], check=True)"
    result = subprocess.run(
        [sys.executable, "-c", outer, "a b"], capture_output=True, text=True, check=True, cwd=ROOT, timeout=60
    )
    words = eval(result.stdout)
    assert words[0][1] == "-c" and words[0][3] == "a b"
    # A worker of pytest-xdist has another command, below pytest's.
    assert any("pytest" in word for above in words[1:] for word in above)
