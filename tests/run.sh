#!/usr/bin/env bash
# Run lint, the self-check and all tests in a new virtual environment with the package installed.
# Needs only Python 3.10 or newer and a C++ compiler. Arguments are passed on to pytest.
# Without a GPU, Triton kernels run in Triton's interpreter and are also compiled for every supported architecture.
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
python="$work/venv/bin/python"
export TORCH_EXTENSIONS_DIR="$work/torch_extensions" # empty, so that compiling on first use is tested too

echo "== install"
"$python" -m pip install -q -c constraints.txt '.[test,dev]'
echo "== lint"
"$python" -m ruff format --check .
"$python" -m ruff check .
"$python" -m mypy
"$work/venv/bin/lint-imports"
echo "== self-check of the installed package"
(cd "$work" && "$python" -m deltamem_kernels && TRITON_INTERPRET=1 "$python" -m deltamem_kernels)
echo "== tests"
"$python" -m pytest -n auto --dist loadfile --no-loadscope-reorder "$@"
echo "== Triton kernels with the newest release"
"$python" -m pip install -q --no-deps --target "$work/newest" triton==3.9.0
PYTHONPATH="$work/newest" "$python" -m pytest -n auto tests/test_parity.py -k "triton and (gates or packed or outside or subset)"
