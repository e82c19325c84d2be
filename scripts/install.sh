#!/bin/sh
# Install depthmix into a virtual environment of its own.
#
#   scripts/install.sh VENV EXTRAS        e.g. scripts/install.sh .venv test,dev
#
# Without an NVIDIA GPU, torch is pinned by constraints-cpu.txt (or the file that $CONSTRAINTS names) and taken
# as the CPU build: first from the package index this machine is set up with, else from PyTorch's own CPU
# index. The CUDA build, several GB, is never installed there.
set -eu
venv=$1
extras=$2
constraints=${CONSTRAINTS:-constraints-cpu.txt}
python=${PYTHON:-python3}
cd "$(dirname "$0")/.."

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "depthmix needs Python 3.11 or later, but $python is $("$python" --version 2>&1). Try: make PYTHON=python3.11" >&2
    exit 2
}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || {
    echo "could not create a virtual environment in $venv; on Debian and Ubuntu: apt install python3-venv" >&2
    exit 2
}
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then
    echo "NVIDIA GPU found: torch as the package index has it"
    pip install --progress-bar off -q ${CONSTRAINTS:+-c "$CONSTRAINTS"} -e ".${extras:+[$extras]}"
    exit
fi

echo "no NVIDIA GPU: torch pinned by $constraints"
wanted=$(sed -n 's/^torch==//p' "$constraints")
have=$("$venv/bin/python" -c 'from importlib.metadata import version; print(version("torch").split("+")[0])' 2>/dev/null || true)
if [ "$have" != "$wanted" ]; then
    if [ "$(uname -s)-$(uname -m)" = Linux-x86_64 ]; then
        # Here the index's plain wheel is the CUDA build; the CPU build has "+cpu" in its version.
        pip install --progress-bar off -q "torch==$wanted+cpu" 2>/dev/null ||
            pip install --progress-bar off -q "torch==$wanted+cpu" --extra-index-url https://download.pytorch.org/whl/cpu || {
            echo "no CPU build of torch $wanted for $("$venv/bin/python" --version) can be reached; install one into $venv and run make again" >&2
            exit 2
        }
    else
        pip install --progress-bar off -q -c "$constraints" torch
    fi
fi
pip install --progress-bar off -q -c "$constraints" -e ".${extras:+[$extras]}"
