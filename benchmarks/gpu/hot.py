"""`python -m benchmarks.gpu.hot OPERATION IMPLEMENTATION`: one call of a benchmark between cudaProfilerStart and -Stop,
for ncu; with --rows, its kernels' times as torch's profiler sees them."""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ..registry import Shape, load_operations
from ..runner import leaf_inputs
from .steps import CANNOT, FAILED, OK, Finished, Outcome

WARM_UP = 3
CALLS = 20
REFUSALS = ("ERR_NVGPUCTRPERM", "Failed to initialize the profiler", "LibraryNotLoaded", "not supported")


def prepared(operation: str, implementation: str, shape: Shape) -> Callable[[], object]:
    found = next(x for x in load_operations() if x.name == operation)
    chosen = next(x for x in found.implementations if x.name == implementation)
    reason = chosen.why_not(shape)
    if reason:
        raise SystemExit2(reason)
    inputs = chosen.prepare(leaf_inputs(found.inputs(shape), found))

    def call() -> None:
        with torch.inference_mode(not found.gradients_of):
            chosen.run(inputs, shape)

    return call


class SystemExit2(SystemExit):
    """It cannot run here."""

    def __init__(self, reason: str) -> None:
        print(reason)
        super().__init__(2)


def kernel_times(call: Callable[[], object], device: str) -> list[dict]:
    """Of each kernel (on a CPU, each of torch's operators): how often a call launches it, and its time in each."""
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU] + [activity.CUDA] * (device == "cuda")) as profile:
        for _ in range(CALLS):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
    rows = []
    for event in profile.key_averages():
        on_device = device == "cuda"
        total = event.self_device_time_total if on_device else event.self_cpu_time_total
        if total > 0 and (not on_device or event.device_type == torch.autograd.DeviceType.CUDA):
            each = total / event.count
            rows.append({"kernel": event.key, "launches_a_call": event.count / CALLS, "microseconds": round(each, 3)})
    return sorted(rows, key=lambda row: -row["microseconds"] * row["launches_a_call"])


def read_ncu(finished: Finished) -> Outcome:
    """From ncu's CSV: a row for each kernel that was launched, with its metrics by name."""
    refused = next((line for line in finished.output.splitlines() if any(x in line for x in REFUSALS)), None)
    if refused:
        return Outcome(CANNOT, f"ncu cannot read this device's counters: {refused.strip()}")
    if finished.status != 0:
        last = (finished.output.strip().splitlines() or ["it said nothing"])[-1]
        return Outcome(FAILED, f"ncu: {last}" if finished.status is not None else "ncu was stopped at its limit")
    rows = ncu_rows(finished.output)
    return Outcome(OK, "", rows) if rows else Outcome(FAILED, "ncu ran, and no kernel was profiled")


def ncu_rows(output: str) -> list[dict]:
    start = re.search(r'^"ID",', output, re.MULTILINE)
    kernels: dict[str, dict] = {}
    if start:
        lines = [line for line in output[start.start() :].splitlines() if line.startswith('"')]
        for line in csv.DictReader(io.StringIO("\n".join(lines))):
            of_kernel = kernels.setdefault(line["ID"], {"kernel": line["Kernel Name"], "metrics": {}, "status": "ok"})
            if line.get("Metric Name"):
                unit = line["Metric Unit"]
                of_kernel["metrics"][f"{line['Metric Name']}{unit and f' [{unit}]'}"] = line["Metric Value"]
    return list(kernels.values())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.hot", description=__doc__)
    parser.add_argument("operation")
    parser.add_argument("implementation")
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    shape = Shape(
        options.tokens, options.batch, rank=options.rank, dtype=getattr(torch, options.dtype), device=options.device
    )
    call = prepared(options.operation, options.implementation, shape)
    for _ in range(WARM_UP):
        call()
    if options.rows:
        of_case = {"operation": options.operation, "implementation": options.implementation, "shape": str(shape)}
        rows = [of_case | row | {"status": "ok"} for row in kernel_times(call, options.device)]
        options.rows.write_text(json.dumps({"rows": rows}))
        print(f"{len(rows)} kernels")
        return int(not rows)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
