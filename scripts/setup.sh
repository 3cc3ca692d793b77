#!/usr/bin/env bash
# Makes .venv and installs potstill into it, with the versions of constraints.txt. Does nothing when nothing changed.
#
#   PYTHON=/path/to/python3.12 scripts/setup.sh    choose the interpreter of a new .venv
#
# A machine without an NVIDIA driver gets the CPU build of torch where there is one: the default build for Linux brings
# gigabytes of CUDA libraries.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=.venv/bin/python
stamp=.venv/potstill-stamp
cpu_builds=https://download.pytorch.org/whl/cpu

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        is_recent "$PYTHON" || fail "PYTHON=$PYTHON is not a Python of at least 3.11. Name another one."
        echo "$PYTHON"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python3.14 python; do
        if is_recent "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python of at least 3.11 found. Install one, or name it: make PYTHON=/path/to/python3 ..."
}

make_venv() {
    local base
    base=$(find_python)
    say "making .venv with $("$base" --version)"
    rm -rf .venv
    "$base" -m venv .venv || {
        rm -rf .venv
        fail "$base cannot make virtual environments. On Debian or Ubuntu: apt install python3-venv."
    }
}

# What decides the environment: the declared dependencies, their versions, this script, and the interpreter.
fingerprint() {
    "$python" - pyproject.toml constraints.txt scripts/setup.sh <<'PY'
import hashlib, pathlib, sys
content = b"".join(pathlib.Path(name).read_bytes() for name in sys.argv[1:])
print(hashlib.sha256(content + sys.version.encode()).hexdigest())
PY
}

pip_install() { "$python" -m pip install --disable-pip-version-check --no-input --quiet "$@"; }

install_torch() {
    local version
    version=$(sed -n 's/^torch==//p' constraints.txt)
    if [ "$(uname -s)" = Linux ] && ! nvidia-smi >/dev/null 2>&1; then
        say "no NVIDIA driver here: looking for a CPU build of torch $version"
        pip_install "torch==$version+cpu" 2>/dev/null && return
        pip_install "torch==$version+cpu" --extra-index-url "$cpu_builds" 2>/dev/null && return
        say "no CPU build found; installing the default build of torch, which may bring CUDA libraries (gigabytes)"
    fi
    pip_install "torch==$version"
}

[ -x "$python" ] && is_recent "$python" || make_venv
current=$(fingerprint)
[ "$(cat "$stamp" 2>/dev/null || true)" = "$current" ] && exit 0

say "installing potstill and what it needs into .venv (some minutes on a fresh machine)"
rm -f "$stamp"
install_torch
pip_install --constraint constraints.txt --editable ".[dev]"
echo "$current" >"$stamp"
say "done"
