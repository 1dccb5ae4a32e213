"""`python -m benchmarks.gpu.ceilings`: what this device can do at most, measured: a large copy, a large matrix product,
and the time between two kernels of a CUDA graph."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from .. import measure

COPIED = 2**32
PRODUCT = 8192


def copy(device: str, size: int) -> tuple[Callable[[], object], float]:
    """The call, and the bytes that it reads and writes."""
    source = torch.rand(size // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2.0 * source.nbytes


def product(device: str, size: int) -> tuple[Callable[[], object], float]:
    """The call, and its floating-point operations. Of random numbers: zeros take less power, and less time."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2.0 * size**3


def tiny_kernel(device: str, size: int) -> tuple[Callable[[], object], float]:
    x = torch.zeros(32, device=device)
    return lambda: x.add_(1.0), 1.0


CEILINGS = {
    "copy": (copy, COPIED, "bytes a second"),
    "matrix product, bfloat16": (product, PRODUCT, "operations a second"),
    "a kernel that does nothing much": (tiny_kernel, 0, "kernels a second"),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.ceilings", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--shrink", type=int, default=1, help="divide the sizes by this: a look")
    parser.add_argument("--rows", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    rows = []
    for name, (make, size, unit) in CEILINGS.items():
        call, work = make(options.device, size // options.shrink)
        call()
        if options.device == "cuda":
            stopwatch = measure.CudaStopwatch([call] * (1 if size else 512))
        else:
            stopwatch = measure.CpuStopwatch(call, [torch.get_num_threads()])
        measure.round_robin([stopwatch], options.seconds, lambda share: None)
        low, seconds, high = measure.quartiles(stopwatch.samples)
        row = {"ceiling": name, "seconds": seconds, "quartiles": [low, high], "samples": len(stopwatch.samples)}
        rows.append(row | {"rate": work / seconds, "unit": unit, "method": stopwatch.method, "status": "ok"})
        print(f"{name}: {work / seconds:.4g} {unit}")
        del call, stopwatch
    if options.rows:
        options.rows.write_text(json.dumps({"rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
