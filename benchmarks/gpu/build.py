"""`python -m benchmarks.gpu.build`: compiles the libraries of csrc/ and Triton's kernels for this GPU, and says
how long it took."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from deltamem_kernels import delta_update
from deltamem_kernels.backends import BackendUnavailableError, extension


def first_call(backend: str, device: str) -> None:
    """Of a short scan, forward and backward: the library is compiled, or the kernels."""
    operands = [torch.rand(1, 130, 1, 8, device=device).requires_grad_() for _ in range(4)]
    out = delta_update(*operands, backend=backend)
    gradients = torch.autograd.grad(out.reads.sum(), operands)
    if not all(x.isfinite().all() for x in gradients):
        raise ArithmeticError(f"{backend}: gradients that are not finite")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.build", description=__doc__)
    parser.add_argument("--backend", nargs="+", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    rows = []
    for backend in options.backend:
        began = time.perf_counter()
        try:
            first_call(backend, "cpu" if backend == "cpu" else options.device)
        except (BackendUnavailableError, extension.BuildError) as error:
            print(f"{backend}: {error}")
            return 2
        rows.append({"backend": backend, "first_call_seconds": round(time.perf_counter() - began, 1), "status": "ok"})
        print(rows[-1])
    if options.rows:
        options.rows.write_text(json.dumps({"rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
