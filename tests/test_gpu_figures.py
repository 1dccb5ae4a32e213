"""How a GPU's times are taken, paired and shown, on machines that have no GPU."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # the harness is not installed

from benchmarks import measure
from benchmarks.gpu import cases, checks, figures, timing
from benchmarks.registry import Implementation, Operation, Shape, load_operations


def test_short_calls_are_replayed_from_a_graph(monkeypatch):
    """A stand-in for a GPU, where a launch from Python takes 100 µs and a replayed one 10."""
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

    @contextlib.contextmanager
    def capturing(captured: Graph):
        gpu.capturing = captured.calls = []
        yield
        gpu.capturing = None

    def call(i: int) -> None:
        if gpu.capturing is not None:
            gpu.capturing.append(i)
        else:
            gpu.now += gpu.each

    stream = SimpleNamespace(wait_stream=lambda other: None)
    fake = {"Event": Event, "CUDAGraph": Graph, "graph": capturing, "Stream": lambda: stream}
    fake |= {"current_stream": lambda: stream, "stream": lambda s: contextlib.nullcontext()}
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


class Drifting:
    """A stopwatch on a machine that becomes slower with every round."""

    def __init__(self, name: str, seconds: float, order: list[str]) -> None:
        self.name, self.seconds, self.order, self.samples = name, seconds, order, []

    def start(self) -> None:
        self.order.append(self.name)

    def sample(self) -> None:
        self.samples.append(self.seconds * (1 + len(self.samples)))


def test_pairs_cancel_a_drift_that_the_medians_show():
    order: list[str] = []
    a, b = Drifting("a", 1e-6, order), Drifting("b", 3e-6, order)
    measure.paired([a, b], seconds=0.0, least=4)
    assert "".join(order) in ("baabbaab", "abbaabba"), "the order must alternate"
    assert len(a.samples) == len(b.samples) == 4
    assert measure.quartiles(a.samples) == pytest.approx((1.75e-6, 2.5e-6, 3.25e-6))
    assert measure.paired_ratio(b.samples, a.samples) == pytest.approx((3.0, 3.0, 3.0))
    assert measure.paired_ratio([2.0, 3.0, 8.0], [1.0, 1.0, 2.0]) == pytest.approx((2.5, 3.0, 3.5))


def doubling(factor: float) -> Implementation:
    return Implementation(f"x {factor:g}", lambda inputs, shape: {"y": factor * inputs["x"]})


def test_a_case_times_what_is_right_and_pairs_it_with_its_first_variant(monkeypatch):
    operation = Operation(
        name="doubling",
        inputs=lambda shape: {"x": torch.ones(shape.tokens)},
        oracle=lambda inputs, shape: {"y": 2 * inputs["x"]},
        bytes_moved=lambda shape: 8 * shape.tokens,
        implementations=(doubling(2), doubling(3)),
        baseline="x 2",
    )
    monkeypatch.setattr(timing, "load_operations", lambda: [operation])
    monkeypatch.setattr(measure, "copy_bandwidth", lambda device: 1e9)
    case = cases.Case("scan", "doubling", "doubling", Shape(1000), cases.variants("x 2", "x 3"))
    right, wrong, again = timing.time_case(case, "cpu", 0.01)
    assert (right["implementation"], right["status"], right["ratio"]) == ("x 2", "ok", (1.0, 1.0, 1.0))
    assert right["kernels"][0]["a_call"] >= 1
    assert (wrong["implementation"], wrong["status"], wrong["seconds"]) == ("x 3", "WRONG", None)
    assert (again["implementation"], again["ratio_to"]) == ("x 2, again", "x 2")
    assert again["samples"] == right["samples"] >= measure.LEAST_SAMPLES


def test_a_switch_is_held_during_each_call_and_no_longer():
    held: list[bool] = []

    @contextlib.contextmanager
    def switch():
        held.append(True)
        yield
        held.pop()

    found = Implementation("ours", lambda inputs, shape: {"held": len(held)})
    operation = SimpleNamespace(implementations=(found,))
    switched = cases.Variant("ours", "switched", switch).of(operation)
    assert (switched.name, switched.run({}, None), held) == ("ours, switched", {"held": 1}, [])
    assert cases.Variant("ours").of(operation) is found


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: f"{case.part}: {case.name}")
def test_the_variants_of_a_case_exist(case):
    operations = {operation.name: operation for operation in load_operations()}
    for each in (case, cases.rehearsed(case)):
        names = [variant.of(operations[each.operation]).name for variant in each.variants]
        assert len(set(names)) == len(names) >= 2


def stale(call):
    """A graph that was captured of other buffers than those that change."""
    captured = {name: x.clone() for name, x in call().items()}
    return lambda: None, captured


@pytest.mark.parametrize("name", checks.PROBLEMS)
def test_a_graph_has_to_follow_its_buffers(name):
    assert checks.check_graph(name, "cpu", "cpu", checks.call_again)["status"] == "ok"
    assert checks.check_graph(name, "cpu", "cpu", stale)["status"] == "WRONG"


def test_replays_have_padding_and_other_slots_each_time():
    drawn = [checks.step()["state_indices"].tolist() for _ in range(20)]
    assert all(-1 in slots for slots in drawn)
    assert len(set(map(tuple, drawn))) > 10


def row(variant: str, seconds: float | None, **more) -> dict:
    made = {
        "part": "scan",
        "case": "forward",
        "implementation": variant,
        "seconds": seconds,
        "status": "ok",
        "note": "",
    }
    made |= {"quartiles": seconds and [seconds / 2, 2 * seconds], "ratio": None}
    return made | dict.fromkeys(("device", "torch", "triton", "commit"), "x") | more


def test_the_table_and_the_plot_show_the_newest_figures(tmp_path):
    rows = [row("ours", 9e-5), row("ours", 2e-5, ratio=[0.9, 1.0, 1.25]), row("a peer", None, note="it is not here")]
    lines = figures.table(rows).splitlines()
    assert "| scan: forward | ours | 20.0 µs | 10.0 µs to 40.0 µs | 1 | 0.9 to 1.25 |" in lines
    assert "| scan: forward | a peer | it is not here |  |  |  |" in lines
    assert "9" not in "".join(lines[2:3]).replace("0.9", "")
    assert figures.plot(rows, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")
    assert not figures.plot(rows[2:], tmp_path / "none.png")
