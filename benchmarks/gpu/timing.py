"""`python -m benchmarks.gpu.timing PART NAME`: times the variants of a case in one process, in turns.

`python -m benchmarks.gpu.timing ceilings`: what the device does at most.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

import torch

from .. import machine, measure, report, runner
from ..progress import Progress
from ..registry import load_operations
from . import store
from .cases import CASES, Case, rehearsed

SECONDS = 0.7  # for each variant
KERNELS = 12  # the longest, in a row


def time_case(case: Case, device: str, seconds: float) -> list[dict]:
    """Check every variant, then time those that are right. The first that can run is timed twice: a difference between
    variants that is smaller than the one between these two is noise."""
    operation = next(each for each in load_operations() if each.name == case.operation)
    shape = replace(case.shape, device=device)
    chosen = [variant.of(operation) for variant in case.variants]
    first = next((each for each in chosen if not each.why_not(shape)), chosen[0])
    chosen.append(replace(first, name=f"{first.name}, again"))
    threads = [torch.get_num_threads()]
    settings = runner.Settings(seconds, threads, measure.copy_bandwidth(device))
    rows, timed = runner.check_case(operation, chosen, shape, settings, Progress(2 * len(chosen)))
    kernels = {}
    with torch.inference_mode(not operation.gradients_of):
        measure.paired([stopwatch for _, stopwatch in timed], seconds * len(timed))
        runner.fill(timed)
        samples = {row.implementation: list(stopwatch.samples) for row, stopwatch in timed}
        for row, stopwatch in timed:
            kernels[row.implementation] = kernel_times(stopwatch, device)
    return [_row(case, row, samples, kernels.get(row.implementation)) for row in rows]


def _row(case: Case, row: runner.Row, samples: dict[str, list[float]], kernels: list[dict] | None) -> dict:
    first = next(iter(samples), None)
    ratio = measure.paired_ratio(samples[row.implementation], samples[first]) if row.implementation in samples else None
    of_case = {"part": case.part, "case": case.name, "ratio_to": first, "ratio": ratio, "kernels": kernels}
    return of_case | report.json_row(row)


def kernel_times(stopwatch: measure.CpuStopwatch | measure.CudaStopwatch, device: str) -> list[dict]:
    """The kernels of a call (on a CPU, torch's operators): how often it launches each, and the mean time of one."""
    activity = torch.profiler.ProfilerActivity
    try:
        with torch.profiler.profile(activities=[activity.CUDA if device == "cuda" else activity.CPU]) as profile:
            stopwatch.sample()
    except RuntimeError as error:  # without CUPTI, say: the times that were taken must stay
        return [{"error": machine.without_paths(str(error))}]
    rows = []
    for event in profile.key_averages():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        total = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        if total > 0 and on_device == (device == "cuda"):
            a_call = event.count / stopwatch.calls_a_sample
            rows.append({"kernel": event.key, "a_call": a_call, "microseconds": round(total / event.count, 3)})
    return sorted(rows, key=lambda row: -row["a_call"] * row["microseconds"])[:KERNELS]


def ceilings(device: str, shrink: int) -> list[dict]:
    """A large copy, a large matrix product of random numbers, and a kernel that does nothing much inside a graph."""
    a, b = (torch.randn(8192 // shrink, 8192 // shrink, device=device, dtype=torch.bfloat16) for _ in range(2))
    product, tiny = torch.empty_like(a), torch.zeros(32, device=device)
    source = torch.rand(2**30 // shrink**2, device=device)
    target = torch.empty_like(source)
    measured = (
        ("copy", lambda: target.copy_(source), 2.0 * source.nbytes, "bytes a second"),
        ("matrix product", lambda: torch.mm(a, b, out=product), 2.0 * len(a) ** 3, "operations a second"),
        ("tiny kernel", lambda: tiny.add_(1.0), 1.0, "kernels a second"),
    )
    rows = []
    for name, call, work, unit in measured:
        calls = [call] * (512 if name == "tiny kernel" else 1)
        threads = [torch.get_num_threads()]
        stopwatch = measure.CudaStopwatch(calls) if device == "cuda" else measure.CpuStopwatch(call, threads)
        measure.paired([stopwatch], 1.0 / shrink)
        low, seconds, high = measure.quartiles(stopwatch.samples)
        row = {"part": "ceilings", "case": name, "implementation": "torch", "status": "ok", "seconds": seconds}
        rows.append(row | {"quartiles": [low, high], "rate": work / seconds, "unit": unit, "method": stopwatch.method})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.timing", description=__doc__)
    parser.add_argument("part")
    parser.add_argument("name", nargs="?")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, smaller")
    options = parser.parse_args()
    device = "cpu" if options.rehearse else "cuda"
    if options.part == "ceilings":
        rows = ceilings(device, 16 if options.rehearse else 1)
    else:
        case = next(each for each in CASES if (each.part, each.name) == (options.part, options.name))
        case = rehearsed(case) if options.rehearse else case
        rows = time_case(case, device, 0.05 if options.rehearse else SECONDS)
    for row in rows:
        store.save(row)
    return int(any(row["status"] in ("WRONG", "failed") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
