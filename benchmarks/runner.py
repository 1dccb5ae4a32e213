"""Check and time every implementation of an operation on one shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import measure
from .machine import without_paths
from .progress import Progress
from .registry import Implementation, Operation, Shape, Tensors

# Relative to the norm. The 16-bit limits admit a loop that rounds its state at every token; a wrong formula is far off.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}


@dataclass
class Row:
    """The result of one implementation on one shape."""

    operation: str
    implementation: str
    shape: Shape
    status: str
    """"ok", "WRONG" (not timed), "failed" (it raised, see note) or "not run"."""
    note: str
    bytes_moved: int
    floor_seconds: float
    """Time to move these bytes at the bandwidth of a copy."""
    error: float | None = None
    errors: dict[str, float] | None = None
    seconds: float | None = None
    quartiles: tuple[float, float] | None = None
    samples: int | None = None
    method: str | None = None
    peak_memory_bytes: int | None = None
    kept_bytes: int | None = None
    speed: float | None = None

    @property
    def tokens(self) -> int:
        return self.shape.batch * self.shape.tokens

    @property
    def timings(self) -> dict[str, float | None]:
        """Figures derived from the median time."""
        if self.seconds is None:
            return dict.fromkeys(("spread", "tokens_per_second", "ns_per_token", "gb_per_second", "share_of_floor"))
        low, high = self.quartiles
        return {
            "spread": (high - low) / self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
            "ns_per_token": 1e9 * self.seconds / self.tokens,
            "gb_per_second": self.bytes_moved / self.seconds / 1e9,
            "share_of_floor": self.floor_seconds / self.seconds,
        }


@dataclass
class Settings:
    seconds: float
    thread_choices: Sequence[int]
    bandwidth: float
    quick: bool = False
    samples: float = math.inf
    """Maximum number of samples."""


def relative_errors(outputs: Tensors, expected: Tensors) -> dict[str, float]:
    """Return for each expected output the norm of the difference divided by the norm of the expected value."""
    errors = {}
    for name, truth in expected.items():
        if outputs[name].shape != truth.shape:
            errors[name] = float("inf")
            continue
        difference = outputs[name].detach().to("cpu", torch.float64) - truth
        errors[name] = (difference.norm() / truth.norm().clamp_min(1e-30)).item()
    return errors


def run_case(
    operation: Operation,
    implementations: Sequence[Implementation],
    shape: Shape,
    settings: Settings,
    progress: Progress,
) -> list[Row]:
    """Return one row for each implementation, in order. Progress advances by two for each."""
    rows, timed = check_case(operation, implementations, shape, settings, progress)
    if timed:
        progress.describe(f"{operation.name}, T={shape.tokens}: timing")
        with torch.inference_mode(not operation.gradients_of):
            measure.round_robin([each for _, each in timed], settings.seconds, progress.advance, settings.samples)
    fill(timed)
    baseline = next((row.seconds for row in rows if row.implementation == operation.baseline), None)
    for row, _ in timed:
        row.speed = baseline / row.seconds if baseline else None
    return rows


Timed = list[tuple[Row, "measure.CpuStopwatch | measure.CudaStopwatch"]]


def check_case(
    operation: Operation,
    implementations: Sequence[Implementation],
    shape: Shape,
    settings: Settings,
    progress: Progress,
) -> tuple[list[Row], Timed]:
    """Return a row for each implementation, and a stopwatch for each correct one."""
    reasons = {implementation.name: why_not(implementation, shape, settings) for implementation in implementations}
    rows = [_empty_row(operation, each, shape, settings, reasons[each.name]) for each in implementations]
    runnable = [(each, row) for each, row in zip(implementations, rows, strict=True) if row.status == "ok"]
    progress.advance(2 * (len(rows) - len(runnable)))
    if not runnable:
        return rows, []
    torch.set_num_threads(max(settings.thread_choices))
    progress.describe(f"{operation.name}, T={shape.tokens}: float64 reference")
    inputs = operation.inputs(shape)
    exact = {name: tensor.to("cpu", torch.float64) for name, tensor in inputs.items()}
    outputs = operation.oracle(leaf_inputs(exact, operation), shape)
    expected = {name: output.detach() for name, output in outputs.items()}
    del exact, outputs
    timed: Timed = []
    with torch.inference_mode(not operation.gradients_of):
        for implementation, row in runnable:
            progress.describe(f"{operation.name}, T={shape.tokens}: {implementation.name}")
            stopwatch = _check(operation, implementation, shape, inputs, expected, row, settings)
            progress.advance(1 if stopwatch else 2)
            if stopwatch:
                timed.append((row, stopwatch))
    return rows, timed


def fill(timed: Timed) -> None:
    """Copy the stopwatches' measurements to their rows."""
    for row, stopwatch in timed:
        low, row.seconds, high = measure.quartiles(stopwatch.samples)
        row.quartiles, row.samples, row.method = (low, high), len(stopwatch.samples), stopwatch.method


def why_not(implementation: Implementation, shape: Shape, settings: Settings) -> str | None:
    """Return why an implementation does not run on a shape, or None."""
    if settings.quick and implementation.slow_start:
        return "slow to start: skipped by --quick"
    reason = implementation.why_not(shape)
    return reason and without_paths(reason)


def _empty_row(
    operation: Operation, implementation: Implementation, shape: Shape, settings: Settings, reason: str | None
) -> Row:
    moved = operation.bytes_moved(shape)
    status, note = ("not run", reason) if reason else ("ok", implementation.note)
    return Row(operation.name, implementation.name, shape, status, note, moved, moved / settings.bandwidth)


def leaf_inputs(inputs: Tensors, operation: Operation) -> Tensors:
    """Copy the inputs as leaves, of which the operation's `gradients_of` require gradients."""
    names = operation.gradients_of
    return {name: tensor.detach().clone().requires_grad_(name in names) for name, tensor in inputs.items()}


def _check(
    operation: Operation,
    implementation: Implementation,
    shape: Shape,
    inputs: Tensors,
    expected: Tensors,
    row: Row,
    settings: Settings,
) -> measure.CpuStopwatch | measure.CudaStopwatch | None:
    """Compare one result with the oracle's and measure its memory. Return a stopwatch if the result is correct."""
    try:
        prepared = implementation.prepare(leaf_inputs(inputs, operation))
        outputs = implementation.present(implementation.run(prepared, shape))
        row.errors = relative_errors(outputs, expected)
        del outputs
        row.error = max(row.errors.values())
        if not all(error <= TOLERANCE[shape.dtype] for error in row.errors.values()):  # a NaN is wrong too
            row.status = "WRONG"
            return None
        if operation.gradients_of:
            row.kept_bytes = measure.kept_for_backward(lambda: implementation.run(prepared, shape), prepared.values())
        row.peak_memory_bytes = measure.peak_memory(lambda: implementation.run(prepared, shape), shape.device)
        if shape.device != "cuda":
            return measure.CpuStopwatch(lambda: implementation.run(prepared, shape), settings.thread_choices)
        copies = measure.copies_past_cache(sum(tensor.nbytes for tensor in inputs.values()), shape.device)
        many = [implementation.prepare(leaf_inputs(inputs, operation)) for _ in range(copies)]
        calls = [lambda each=each: implementation.run(each, shape) for each in many]
        return measure.CudaStopwatch(calls, implementation.graph)
    except Exception as error:  # a failing implementation must not discard the figures of the others
        first_line = (str(error).splitlines() or [""])[0]
        row.status, row.note = "failed", without_paths(f"{type(error).__name__}: {first_line}")
        return None
