"""`python -m benchmarks`: check every implementation, time the correct ones, and print, plot and save the results."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from deltamem_kernels.nn.files import replace_file

from . import machine, measure, report
from .progress import Progress
from .registry import Operation, Shape, load_operations
from .runner import Settings, run_case

RESULTS = Path(__file__).parent / "results"
DTYPES = ("float32", "bfloat16", "float16", "float64")


def parse(arguments: Sequence[str], operation_names: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("--op", nargs="+", metavar="NAME", help=f"operations, or parts of their names: {', '.join(operation_names)}")
    add("--impl", nargs="+", metavar="NAME", help="implementations, or parts of their names")
    add("--input", choices=("random", "smollm2"), default="random", help="smollm2: hidden states of a real dialogue")
    add("--dtype", choices=DTYPES, default="float32")
    add("--mode", choices=("standard", "lambda_outside", "no_lambda"), default="standard")
    add("--gates", choices=("row", "head"), default="row", help="one gate per state row, or one per head")
    add("--rank", type=int, default=8)
    add("--heads", type=int, default=1)
    add("--batch", type=int, nargs="+", help="batch sizes (default: depends on the operation, mostly 1)")
    add(
        "--tokens",
        type=int,
        nargs="+",
        help="sequence lengths (default: depends on the operation, mostly 128 1024 8192)",
    )
    add("--most", type=int, default=2**21, help="skip shapes with more tokens in a batch than this (default: 2^21)")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=int, default=os.cpu_count(), help="CPU: use one thread or this many, whichever is faster")
    add("--seconds", type=float, help="time for each implementation and shape (default: 2)")
    add("--samples", type=int, default=math.inf, help="maximum number of samples, at least 3 (default: no maximum)")
    add("--quick", action="store_true", help="only the first default shape, 0.1 s each, no slow starters")
    add("--json", type=Path, metavar="FILE", help="default: benchmarks/results/DEVICE-INPUT-DTYPE.json")
    add("--plot", type=Path, metavar="FILE", help="default: the JSON file's name with the suffix .png")
    options = parser.parse_args(arguments)
    options.seconds = options.seconds or (0.1 if options.quick else 2.0)
    options.json = options.json or RESULTS / f"{options.device}-{options.input}-{options.dtype}.json"
    options.plot = options.plot or options.json.with_suffix(".png")
    if min(options.rank, options.heads, options.threads, *options.batch or [1], *options.tokens or [1]) < 1:
        parser.error("sizes and threads must be at least 1")
    if options.samples < measure.LEAST_SAMPLES:
        parser.error(f"--samples must be at least {measure.LEAST_SAMPLES}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    return options


def chosen(parts: Sequence[str] | None, names: Sequence[str]) -> list[str]:
    """Return the names that contain one of the parts. A part that equals a name selects only that name."""
    if parts is None:
        return list(names)
    return [name for name in names if any(part == name or (part in name and part not in names) for part in parts)]


def shapes(operation: Operation, options: argparse.Namespace) -> list[Shape]:
    """Return the shapes to run: the sizes from the options, or the operation's defaults (with --quick the first)."""
    limit = 1 if options.quick else None
    kind = (options.heads, options.rank, getattr(torch, options.dtype), options.device, options.mode, options.gates)
    return [
        Shape(tokens, batch, *kind, options.input)
        for batch in options.batch or operation.batches[:limit]
        for tokens in options.tokens or operation.tokens[:limit]
        if batch * tokens <= options.most
    ]


def main(arguments: Sequence[str] | None = None, operations: Sequence[Operation] | None = None) -> int:
    """Run the benchmarks. Return the exit status: 1 if an implementation is wrong or fails, else 0."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    operations = load_operations() if operations is None else operations
    options = parse(arguments, [operation.name for operation in operations])
    selected = chosen(options.op, [operation.name for operation in operations])
    operations = [operation for operation in operations if operation.name in selected]
    implementations = {}
    for operation in operations:
        names = chosen(options.impl, [each.name for each in operation.implementations])
        implementations[operation.name] = [each for each in operation.implementations if each.name in names]
    cases = [(operation, shape) for operation in operations for shape in shapes(operation, options)]
    total = 2 * sum(len(implementations[operation.name]) for operation, _ in cases)
    if not total:
        raise SystemExit("nothing to do: no operation or implementation matches, or every shape exceeds --most")

    torch.set_num_threads(options.threads)
    bandwidth = measure.copy_bandwidth(options.device)
    settings = Settings(options.seconds, sorted({1, options.threads}), bandwidth, options.quick, options.samples)
    header = machine.header(arguments, options.device, options.threads, bandwidth)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    rows: list = []
    with Progress(total) as progress:
        for operation, shape in cases:
            rows += run_case(operation, implementations[operation.name], shape, settings, progress)
            found = report.as_json(header, rows)  # saved after every case, so an interrupted run keeps its results
            replace_file(options.json, lambda name, found=found: Path(name).write_text(found))

    print(f"{header['device']}, {header['cores']} cores, copy {header['copy_bandwidth_gb_s']} GB/s", end="")
    print(f"; torch {header['torch']}, Python {header['python']}, {header['os']}")
    print(report.table(rows))
    print(f"\nwritten: {options.json}", end="")
    try:
        report.plot(header, rows, options.plot)
        print(f", {options.plot}")
    except ImportError:
        print("; no plot: matplotlib is not installed")
    return int(any(row.status in ("WRONG", "failed") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
