#!/bin/sh
# Makes .venv with the pinned requirements and the command deberta-dist, once: demo.sh and tests/run.sh both start here.
#   sh launchers/setup_env.sh [--with NAME==VERSION[,...]] [EXTRA ...]
# EXTRA adds requirements-EXTRA.txt: huggingface, test. --with replaces pinned versions; give it a VENV of its own.
# PYTHON=...             interpreter to build the environment with (default: the first Python >= 3.11 found)
# VENV=...               directory of the environment (default .venv)
# PYTORCH_CPU_INDEX=...  where torch without CUDA comes from, on Linux without a GPU; empty = do not ask
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
venv=${VENV:-$root/.venv}
here="$root/launchers"
with=

say() { echo "setup_env: $*"; }
die() { echo "setup_env: $*" >&2; exit 2; }

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        new_enough "$PYTHON" || die "PYTHON=$PYTHON is not a Python 3.11 or newer"
        echo "$PYTHON"
        return
    fi
    for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
        if new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    die "Python 3.11 or newer is needed; found: $(python3 --version 2>&1 || echo none). Set PYTHON=/path/to/python"
}

has_nvidia_gpu() {
    command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q '^GPU '
}

# The lines of requirements file $1 and of those it includes, with the versions of --with in place of the pinned ones.
requirements() {
    "$venv/bin/python" - "$1" "$with" <<'END'
import pathlib, re, sys

def lines(path):
    for line in path.read_text().splitlines():
        if line.startswith("-r "):
            yield from lines(path.parent / line[3:])
        elif line and not line.startswith("#"):
            yield line

replaced = {word.partition("==")[0]: word for word in sys.argv[2].split(",") if word}
for line in lines(pathlib.Path(sys.argv[1])):
    print(replaced.get(re.split("[<>=]", line)[0], line))
END
}

# $1 requirements file; done if its stamp holds the hash of everything that decides what is installed.
install() {
    name=$(basename "$1" .txt)
    stamp="$venv/.installed-$name"
    wanted="$venv/$name.txt"
    requirements "$1" >"$wanted"
    hash=$(cat "$root/pyproject.toml" "$here"/requirements*.txt "$wanted" | "$venv/bin/python" -c \
        'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$hash" ]; then
        return
    fi
    say "installing $name into $venv"
    if [ "$name" = requirements ]; then
        install_torch "$wanted"
    fi
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$wanted" || die "pip could not install $1"
    echo "$hash" >"$stamp"
}

install_torch() {
    torch=$(grep '^torch==' "$1")
    index=${PYTORCH_CPU_INDEX-https://download.pytorch.org/whl/cpu}
    # The default index has CUDA builds for Linux: gigabytes that a machine without a GPU has no use for.
    if [ "$(uname -s)" = Linux ] && [ -n "$index" ] && ! has_nvidia_gpu; then
        # No retries and --no-deps: what torch needs comes from the default index in the next step.
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --retries 0 --timeout 5 --no-deps \
            --index-url "$index" "$torch+cpu" >/dev/null 2>&1 ||
            say "PyTorch's CPU index cannot be reached; $torch comes from the default index"
    fi
}

# The console script deberta-dist for this checkout. pip would need setuptools >= 77, which a fresh venv lacks, and a network to
# get it. A command that "pip install" has made stays.
install_command() {
    "$venv/bin/python" - "$root" <<'END'
import os, pathlib, shlex, sys

path = pathlib.Path(sys.prefix, "bin", "deberta-dist")
mark = "# Made by launchers/setup_env.sh"
# The first line is for the shell and the rest for Python: "#!" takes neither long paths nor spaces.
text = f"""#!/bin/sh
'''exec' {shlex.quote(f"{sys.prefix}/bin/python")} "$0" "$@"
'''
{mark}
import sys

sys.path.insert(0, {sys.argv[1]!r})

from deberta_dist.cli.main import run

run()
"""
old = path.read_text() if path.exists() else mark
if mark in old and old != text:
    new = path.with_suffix(f".{os.getpid()}")
    new.write_text(text)
    new.chmod(0o755)
    new.replace(path)
END
}

if [ "${1:-}" = --with ]; then
    [ $# -ge 2 ] || die "--with needs NAME==VERSION[,NAME==VERSION...]"
    with=$2
    shift 2
    for word in $(echo "$with" | tr ',' ' '); do
        grep -q -h "^${word%%==*}[<>=]" "$here"/requirements*.txt && [ "$word" != "${word#*==?}" ] ||
            die "--with $word: expected NAME==VERSION of a package in launchers/requirements*.txt"
    done
    [ "$venv" != "$root/.venv" ] || die "--with needs a directory of its own: set VENV"
fi
if [ ! -x "$venv/bin/python" ]; then
    python=$(find_python)
    say "making $venv with $("$python" --version)"
    "$python" -m venv "$venv" || die "'$python -m venv' failed; on Debian and Ubuntu: apt install python3-venv"
fi
new_enough "$venv/bin/python" ||
    die "$venv has $("$venv/bin/python" --version 2>&1), but 3.11 or newer is needed; remove it"

install_command
install "$here/requirements.txt"
for extra in "$@"; do
    [ -f "$here/requirements-$extra.txt" ] || die "no EXTRA $extra: there is no launchers/requirements-$extra.txt"
    install "$here/requirements-$extra.txt"
done
