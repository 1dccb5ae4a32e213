"""Figures of a GPU: how they are taken, and the table that is made of them, where there is none."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # the harness is not installed

from benchmarks import measure
from benchmarks.gpu import results
from benchmarks.gpu.steps import OK, PROVENANCE
from benchmarks.operations import layer
from benchmarks.registry import Shape
from benchmarks.runner import relative_errors

ORIGIN = {name: f"a {name}" for name in PROVENANCE}


# The stopwatch


def test_short_calls_are_replayed_from_a_graph(monkeypatch):
    """On a GPU of a few lines, where a launch from Python takes 100 µs and a replayed one 10."""
    gpu = SimpleNamespace(now=0.0, capturing=None, each=1e-4)

    class Event:
        def __init__(self, enable_timing: bool) -> None: ...

        def record(self) -> None:
            self.at = gpu.now

        def synchronize(self) -> None: ...

        def elapsed_time(self, other: Event) -> float:
            return 1e3 * (other.at - self.at)

    class Graph:
        def replay(self) -> None:
            gpu.now += 1e-5 * len(self.calls)

    class Capturing:
        def __init__(self, captured: Graph) -> None:
            gpu.capturing = captured.calls = []

        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None:
            gpu.capturing = None

    def call(i: int) -> None:
        if gpu.capturing is not None:
            gpu.capturing.append(i)
        else:
            gpu.now += gpu.each

    stream = SimpleNamespace(wait_stream=lambda other: None)
    fake = {"Event": Event, "CUDAGraph": Graph, "graph": Capturing, "Stream": lambda: stream}
    fake |= {"current_stream": lambda: stream, "stream": lambda s: measure.contextlib.nullcontext()}
    for name, x in fake.items():
        monkeypatch.setattr(torch.cuda, name, x)
    calls = [lambda i=i: call(i) for i in range(40)]
    watches = [measure.CudaStopwatch(calls, how) for how in (None, False)]
    for watch in watches:
        watch.sample()
    assert [watch.method for watch in watches] == ["CUDA graph of 40", "events"]
    assert [watch.samples[0] for watch in watches] == pytest.approx([1e-5, 1e-4])
    gpu.each = 0.02  # longer than its launches
    long = measure.CudaStopwatch(calls)
    long.sample()
    assert (long.method, long.samples) == ("events", pytest.approx([0.02]))


# The layer


@pytest.mark.parametrize("tokens", [1, 9])
def test_a_layer_with_norms_over_its_heads(tokens, monkeypatch):
    """With a memory and without, and its attention in blocks."""
    monkeypatch.setattr(layer, "QUERIES_AT_ONCE", 4)
    operation = layer._operation("small", layer.Layer(32, 4, 2, 16, head_norm=True))
    shape = Shape(tokens, batch=2)
    inputs = operation.inputs(shape)
    exact = operation.oracle({name: x.double() for name, x in inputs.items()}, shape)
    for run in (x.run for x in operation.implementations if x.name in ("frozen", "with memory (cpu)")):
        with torch.inference_mode():
            ours = run({name: x.clone() for name, x in inputs.items()}, shape)
        assert relative_errors(ours, exact)["out"] < 2e-5


# The table


def timed(operation: str, implementation: str, seconds: float | None, **shape) -> dict:
    sizes = {"tokens": 8192, "batch": 1, "heads": 1, "rank": 8, "dtype": "bfloat16", "device": "cuda"}
    kind = {"mode": "standard", "gates": "row", "source": "random"}
    row = {"operation": operation, "implementation": implementation, "shape": sizes | kind | shape, "spread": 0.02}
    row |= {"status": "ok" if seconds else "not run", "note": "" if seconds else "needs a compiler", "seconds": seconds}
    row |= {"bytes_moved": 10, "floor_seconds": 1e-7, "quartiles": [seconds, seconds], "samples": 5, "method": "events"}
    none = dict.fromkeys(("error", "errors", "peak_memory_bytes", "speed"))
    return row | none | {"kept_bytes": 2048 if "backward" in operation else None} | ORIGIN


def test_the_table_and_the_plot_come_from_the_rows(tmp_path):
    forward, training = results.SCAN, results.TRAINING
    rows = [timed(forward, "ours (triton)", 2e-5), timed(forward, "upstream-triton", 3e-3)]
    rows += [timed(forward, "ours (cuda)", None), timed(training, "ours (triton)", 1e-3, device="cpu")]
    rows += [timed(training, "ours (cuda)", 5e-5)]
    parts = {"bench": [{"rows": rows}], "graph": [{"name": "triton", "status": OK, "note": "", "driver": "1"}]}
    lines = results.table(parts).splitlines()
    assert (
        f"| {forward} | 1 | 8,192 | 8 | ours (triton) | 20.0 µs ± 1.0 % | upstream-triton | 3.00 ms ± 1.0 % | 150 | – |"
        in lines
    )
    assert any("| ours (cuda) | not run: needs a compiler | upstream-triton | 3.00 ms" in line for line in lines)
    assert any(line.startswith(f"| {training} | 1 | 8,192 | 8 | ours (triton) | not run yet") for line in lines)
    assert any("| ours (cuda) | 50.0 µs ± 1.0 % | upstream-triton | not run yet | – | 2.00 KiB |" in x for x in lines)
    assert "| `graph` | all 1 steps ok |" in lines
    assert all(f"{name} a {name}" in lines[-1] for name in ORIGIN)
    assert results.plot(parts, tmp_path).read_bytes().startswith(b"\x89PNG")
    assert results.plot({}, tmp_path) is None


def test_the_readme_has_what_the_results_say():
    text = results.README.read_text()
    assert results.written(text, results.table(results.load(results.RESULTS))) == text
