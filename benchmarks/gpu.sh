#!/usr/bin/env bash
# The benchmarks on one GPU: needs this checkout and a Python with PyTorch, nothing installed.
#
#     PYTHON=python3 benchmarks/gpu.sh [--images FILE.npz] [--device cpu] [other options of bench.py]
#
# Writes benchmarks/results/GPU-DATE.json and .md. What is not there is marked "not available": put
# torchdeq (and transformers, for the transformer's rows) beside PyTorch to have all of it. TorchDEQ
# is fetched from PyPI for the length of the run if it is missing and the network allows.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

PYTHONPATH=$("$python" "$root/benchmarks/importable.py" "$scratch/package")${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH
# Nothing is written into the checkout but the results.
export PYTHONDONTWRITEBYTECODE=1
if ! "$python" -c "import torchdeq" 2> "$scratch/why"; then
    "$python" -m pip install --quiet --target "$scratch/torchdeq" --no-deps torchdeq==0.1.0 numpy \
        > "$scratch/pip" 2>&1 \
        && export PYTHONPATH="$PYTHONPATH:$scratch/torchdeq" \
        || echo "without TorchDEQ: $(tail -n 1 "$scratch/why")" >&2
fi

device=cuda
case " $* " in *" --device "*) device= ;; esac
"$python" "$root/benchmarks/bench.py" ${device:+--device "$device"} --cache "$scratch/weights" "$@"
