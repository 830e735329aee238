#!/bin/sh
# setup.sh FOLDER [dev]: a virtual environment with lorakit in it, editable. Used by the Makefile; safe to run again.
set -eu
venv=$1
extra=${2:+[$2]}
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "lorakit needs Python 3.11 or newer; $python is $("$python" --version 2>&1). Set PYTHON=/path/to/python3.11" >&2
    exit 1
}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"

# A plain torch is a CUDA build of several gigabytes: without a GPU the CPU build is asked for.
set --
if ! nvidia-smi >/dev/null 2>&1; then
    set -- --constraint constraints-cpu.txt
fi
echo "Installing lorakit$extra into $venv (a minute or two the first time) ..."
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@" --editable ".$extra"
