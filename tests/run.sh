#!/usr/bin/env bash
# Everything that has to hold, on a machine that has nothing but Python 3.10 or newer and a C++ compiler: makes a fresh
# virtual environment, installs the package there, and runs lint, the self-check and all tests.
# Arguments go to pytest. Without a GPU, Triton's kernels run in its interpreter and are compiled for each architecture.
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
python="$work/venv/bin/python"
export TORCH_EXTENSIONS_DIR="$work/torch_extensions" # first use is part of the test

echo "== install"
"$python" -m pip install -q -c constraints.txt '.[test,dev]'
echo "== lint"
"$python" -m ruff format --check .
"$python" -m ruff check .
"$python" -m mypy
echo "== self-check of the installed package"
(cd "$work" && "$python" -m deltamem_kernels && TRITON_INTERPRET=1 "$python" -m deltamem_kernels)
echo "== tests"
"$python" -m pytest -n auto --dist loadfile --no-loadscope-reorder "$@"
echo "== Triton kernels with the newest release"
"$python" -m pip install -q --no-deps --target "$work/newest" triton==3.9.0
PYTHONPATH="$work/newest" "$python" -m pytest -n auto tests/test_parity.py -k "triton and (gates or packed or nans or subset)"
