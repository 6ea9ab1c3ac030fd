#!/bin/sh
# Installs volumen from a folder with an interpreter's pip: the steps of the container, which the tests run too.
#   TORCH_INDEX=URL sh packaging/install.sh PYTHON SOURCE
# Without TORCH_INDEX, torch comes from where pip finds it, as everything else.
set -eu
python=$1
source=$2
if [ -n "${TORCH_INDEX:-}" ]; then
    "$python" -m pip install --no-cache-dir --index-url "$TORCH_INDEX" "torch>=2.8"
fi
"$python" -m pip install --no-cache-dir "$source[formats,remote,export,instances]"
"$python" -m pip check
