"""`python -m benchmarks.gpu` where there is no GPU: its plan, limits and files, and that what it checks can fail."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # the harness is not installed

from benchmarks.__main__ import chosen, shapes
from benchmarks.__main__ import parse as parse_benchmarks
from benchmarks.gpu import cases, graph, hot, plan, results, resume, steps
from benchmarks.gpu.__main__ import MOST_SECONDS, main
from benchmarks.gpu.steps import CANNOT, FAILED, OK, UNFINISHED, Finished, Record, Step
from benchmarks.registry import load_operations

PROVENANCE = {name: f"a {name}" for name in steps.PROVENANCE}
GPU = plan.Target()


class Machine:
    """A clock, and processes that take as long as they are told to and end as they are told to."""

    def __init__(self, seconds: float = 10.0) -> None:
        self.now, self.seconds = 100.0, seconds
        self.ran: list[str] = []
        self.status: dict[str, int | None] = {}

    def clock(self) -> float:
        return self.now

    def execute(self, command, environment, limit) -> tuple[int | None, str]:
        name, rows = command[0], Path(command[1])
        self.ran.append(name)
        self.now += min(self.seconds, limit)
        rows.write_text(json.dumps({"rows": [{"case": name, "status": "ok"}]}))
        return self.status.get(name, 0), f"{name} says this in /opt/secret/place.py\n"

    def run(self, folder: Path, budget: float, *planned: Step, again: bool = False, copy: Path | None = None) -> str:
        self.ran = []
        left = steps.Budget(budget, self.clock)
        record = Record("part", folder, copy)
        return steps.run_part(
            planned, record, left, PROVENANCE, execute=self.execute, again=again, say=lambda text: None
        )


def step(name: str, **fields) -> Step:
    return Step(name, (name, "{rows}"), **{"limit": 30.0, **fields})


# The plan


@pytest.mark.parametrize("part", plan.PARTS)
def test_each_step_fits_into_a_call_of_eight_minutes(part):
    planned = plan.steps(part, GPU)
    assert len({each.name for each in planned}) == len(planned) > 0
    for each in planned:
        assert (each.least or each.limit) <= MOST_SECONDS - 20 <= 480 - 40, each.name
        assert str(Path.home()) not in each.as_typed()


def test_the_benchmarks_of_the_plan_exist(monkeypatch):
    """Each line selects operations, of each of them an implementation of ours and one to compare it with."""
    operations = {operation.name: operation for operation in load_operations()}
    for each in plan.steps("bench", GPU)[1:]:
        words = [word for word in each.command[3:] if word not in ("--device", "cuda")]
        options = parse_benchmarks(words, list(operations))
        selected = chosen(options.op, list(operations))
        assert selected, each.name
        for name in selected:
            names = chosen(options.impl, [x.name for x in operations[name].implementations])
            assert any("triton" in x or x == "ours" for x in names), (each.name, name)
            assert len(names) > 1, (each.name, name)
    for operation, implementation, *_ in plan.HOT:
        assert implementation in [x.name for x in operations[operation].implementations]


def test_the_table_asks_for_what_the_plan_runs():
    operations = {operation.name: operation for operation in load_operations()}
    planned = set()
    for each in plan.steps("bench", GPU)[1:]:
        words = [word for word in each.command[3:] if word not in ("--device", "cuda")]
        options = parse_benchmarks(words, list(operations))
        for name in chosen(options.op, list(operations)):
            names = chosen(options.impl, [x.name for x in operations[name].implementations])
            sizes = [(x.tokens, x.batch, x.rank) for x in shapes(operations[name], options) if x.gates == "row"]
            planned |= {(name, *size, implementation) for size in sizes for implementation in names}
    for line in results.LINES:
        if line.operation in operations:
            for implementation in (line.ours, line.other):
                assert (line.operation, line.tokens, line.batch, line.rank, implementation) in planned


def test_peers_are_found_beside_the_package(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setattr(plan, "PEERS", tmp_path / ".peers")
    assert plan._with_peers() == ()
    (tmp_path / ".peers" / "delta-Mem").mkdir(parents=True)
    (tmp_path / ".peers" / "a file").touch()
    folders = [str(tmp_path / ".peers"), str(tmp_path / ".peers" / "delta-Mem"), "/elsewhere"]
    assert plan._with_peers() == (("PYTHONPATH", ":".join(folders)),)


def test_what_cannot_run_says_why(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["build", "graph", "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr().out
    assert f"graph: cannot run: needs a GPU: torch {torch.__version__}" in printed
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: None if name == "hypothesis" else name)
    assert "needs the Python packages hypothesis: carry their wheels" in plan.why_not("test", GPU)
    monkeypatch.setattr(plan.build, "missing_tool", lambda kind: None)
    monkeypatch.setattr(plan, "tool", lambda name: None)
    assert plan.why_not("sanitize", GPU) == "compute-sanitizer is neither on PATH nor beside nvcc"
    assert plan.why_not("bench", GPU) is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["build", "everything"], "got everything"),
        (["--seconds", "500"], "at most 460"),
        (["--seconds", "0"], "over 0"),
    ],
)
def test_arguments(words, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert said in capsys.readouterr().err


def test_a_rehearsal_is_kept_apart_and_is_no_figure(tmp_path, capsys):
    machine = Machine()

    def execute(command, environment, limit):
        return machine.execute(["x", command[command.index("--rows") + 1]], environment, limit)

    arguments = ["graph", "--rehearse", "--out", str(tmp_path), "--commit", "0123abc"]
    assert main(arguments, execute, machine.clock) == 0
    (done,) = json.loads((tmp_path / "graph.json").read_text())["steps"]
    assert (done["name"], done["driver"]) == ("cpu", None)
    assert "graph` | not run yet" in results.table(results.load(tmp_path))


# A call, and the next


def test_a_call_stops_in_time_and_the_next_goes_on(tmp_path):
    machine = Machine()
    planned = [step("a"), step("b"), step("c", limit=40.0)]
    assert machine.run(tmp_path, 55.0, *planned) == UNFINISHED  # c could last 40 s, 35 are left
    assert machine.ran == ["a", "b"]
    assert machine.run(tmp_path, 55.0, *planned) == OK
    assert machine.ran == ["c"]
    assert machine.run(tmp_path, 55.0, *planned) == OK
    assert machine.ran == []
    assert machine.run(tmp_path, 100.0, *planned, again=True) == OK
    assert machine.ran == ["a", "b", "c"]


def test_what_failed_is_tried_again_after_what_was_not_tried(tmp_path):
    machine = Machine()
    machine.status = {"a": 1, "b": 2}
    assert machine.run(tmp_path, 35.0, step("a")) == FAILED
    assert machine.run(tmp_path, 99.0, step("a"), step("b"), step("c")) == FAILED
    assert machine.ran == ["b", "c", "a"]
    machine.status = {"b": 2}
    assert machine.run(tmp_path, 99.0, step("a"), step("b"), step("c")) == CANNOT
    assert machine.ran == ["a", "b"]


def test_a_step_gets_no_more_than_what_is_left(tmp_path):
    machine = Machine(seconds=1000.0)
    machine.status = {"a": None}
    assert machine.run(tmp_path, 50.0, step("a", limit=400.0, least=20.0)) == FAILED
    assert machine.now == 150.0
    assert "stopped after 50 s" in json.loads((tmp_path / "part.json").read_text())["steps"][0]["note"]


def test_rows_name_where_they_come_from(tmp_path):
    machine = Machine()
    machine.status = {"a": 1}
    machine.run(tmp_path / "out", 99.0, step("a", environment=(("X", "1"),)), copy=tmp_path / "copy")
    text = (tmp_path / "out" / "part.json").read_text()
    assert text == (tmp_path / "copy" / "part.json").read_text()
    (done,) = json.loads(text)["steps"]
    assert set(done) == {"name", "status", "note", "seconds", "output", "rows", "command", "date", *steps.PROVENANCE}
    assert (done["status"], done["seconds"], done["note"]) == (FAILED, 10.0, "a says this in place.py")
    (row,) = done["rows"]
    assert {name: row[name] for name in PROVENANCE} == PROVENANCE
    assert row["command"] == "X=1 a ROWS.json"
    assert "/opt/secret" not in text


def test_at_the_limit_a_process_ends_with_its_children(tmp_path):
    file = tmp_path / "alive"
    status, output = steps.execute(["sh", "-c", f"(sleep 1; touch '{file}') & echo said; wait"], {}, 0.2)
    assert (status, output) == (None, "said\n")
    assert subprocess.run(["sleep", "1.2"]).returncode == 0
    assert not file.exists()
    assert steps.execute(["sh", "-c", "echo $X; exit 7"], {"X": "y"}, 10.0) == (7, "y\n")


# The suite


SUITE = """
import pytest
def test_right(): pass
def test_wrong(): assert open("fixed").read() == "yes"
@pytest.mark.skip(reason="why not")
def test_skipped(): pass
@pytest.fixture
def ends_badly():
    yield
    raise OSError("at the end")
def test_teardown(ends_badly): pass
"""


def run_suite(folder: Path, suite: str, *options: str) -> tuple[Path, plan.Outcome]:
    """The file that goes on from call to call, and what the call is worth."""
    (folder / "test_it.py").write_text(suite)
    kept = folder / "kept.jsonl"
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.gpu.resume", "--outcomes", str(kept), *options]
    command += ["-q", "-p", "no:cacheprovider", "--rootdir", str(folder), "test_it.py"]
    environment = plan.os.environ | {"PYTHONPATH": str(plan.ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return kept, plan.read_suite(Finished(done.returncode, done.stdout + done.stderr, 1.0, kept))


def test_a_suite_goes_on_where_it_was_stopped(tmp_path):
    (tmp_path / "fixed").write_text("no")
    kept, first = run_suite(tmp_path, SUITE, "-n", "2", "--dist", "loadfile")
    assert (first.status, first.note) == (FAILED, "1 passed, 2 failed, 1 skipped")
    why = {row["test"].split("::")[1]: row["why"] for row in first.rows if "test" in row}
    assert "why not" in why["test_skipped"]
    assert "at the end" in why["test_teardown"]
    (tmp_path / "fixed").write_text("yes")
    with kept.open("a") as file:
        file.write('{"test": "test_it.py::test_ri')  # a line that was being written
    _, again = run_suite(tmp_path, SUITE, "-k", "not teardown")
    assert (again.status, again.note) == (FAILED, "2 passed, 1 failed, 1 skipped")
    assert kept.read_text().count('test_right"') == 1, "what had passed was run again"
    stopped = plan.read_suite(Finished(None, "", 440.0, kept))
    assert (stopped.status, stopped.note) == (UNFINISHED, "2 passed, 1 failed, 1 skipped so far")


SPOILING = """
import pytest, torch
def broken(): raise RuntimeError("an illegal memory access was encountered")
def test_right(): pass
def test_spoils():
    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, broken
def test_later(): pass
"""


def test_a_fault_on_the_gpu_spoils_no_other_test(tmp_path):
    kept, read = run_suite(tmp_path, SPOILING, "-n", "1")
    last = {name.split("::")[1]: entry["outcome"] for name, entry in resume.read(kept).items()}
    assert last == {"test_right": "passed", "test_spoils": "failed", "test_later": "passed"}, read.note


# What the tools say


@pytest.mark.parametrize(
    ("status", "output", "expected"),
    [
        (0, "========= ERROR SUMMARY: 0 errors", OK),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", OK),
        (77, "========= ERROR SUMMARY: 2 errors", FAILED),
        (0, "========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)", FAILED),
        (0, "ok 1e-7 delta_update", FAILED),  # it did not watch
        (1, "WRONG 1e-1 delta_update\n========= ERROR SUMMARY: 0 errors", FAILED),
        (1, "========= Error: Device not supported. Please refer to the documentation", CANNOT),
    ],
)
def test_what_a_sanitizer_says(status, output, expected, tmp_path):
    assert plan.read_sanitizer(Finished(status, output, 1.0, tmp_path / "none")).status == expected


NCU = """==PROF== Connected to process 1
a line of the program
"ID","Process ID","Process Name","Host Name","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","1","python3","a-host","forward_kernel","GPU Speed Of Light Throughput","Duration","us","11.5"
"0","1","python3","a-host","forward_kernel","Launch Statistics","Registers Per Thread","register/thread","53"
"1","1","python3","a-host","fold_kernel","GPU Speed Of Light Throughput","Duration","us","2"
"""


def test_what_ncu_says(tmp_path):
    read = hot.read_ncu(Finished(0, NCU, 1.0, tmp_path))
    assert [row["kernel"] for row in read.rows] == ["forward_kernel", "fold_kernel"]
    assert read.rows[0]["metrics"] == {"Duration [us]": "11.5", "Registers Per Thread [register/thread]": "53"}
    assert "a-host" not in json.dumps(read.rows)
    assert hot.read_ncu(Finished(0, "nothing", 1.0, tmp_path)).status == FAILED
    refused = hot.read_ncu(Finished(1, "==ERROR== ERR_NVGPUCTRPERM - no permission", 1.0, tmp_path))
    assert (refused.status, "counters" in refused.note) == (CANNOT, True)
    assert hot.read_ncu(Finished(9, "==ERROR== Killed", 1.0, tmp_path)).status == FAILED


def test_a_wrong_benchmark_is_named(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"header": {}, "rows": [{"implementation": "ours (cuda)", "status": "WRONG"}]}))
    read = plan.read_benchmarks(Finished(1, "a table", 1.0, file))
    assert (read.status, read.note) == (FAILED, "ours (cuda) WRONG")


def test_a_benchmark_that_was_stopped_keeps_its_rows(tmp_path):
    file = tmp_path / "rows.json"
    assert plan.read_benchmarks(Finished(None, "", 90.0, file, cut_short=True)).status == FAILED
    file.write_text(json.dumps({"header": {}, "rows": [{"implementation": "ours (cuda)", "status": "ok"}]}))
    read = plan.read_benchmarks(Finished(None, "", 90.0, file, cut_short=True))
    assert (read.status, read.note, len(read.rows)) == (UNFINISHED, "1 rows before its time was up", 1)
    whole = plan.read_benchmarks(Finished(None, "", 300.0, file))  # another call would give it no more time
    assert (whole.status, len(whole.rows)) == (FAILED, 1)


def test_a_step_is_cut_short_by_the_call_alone(tmp_path):
    machine, seen = Machine(seconds=1000.0), []
    machine.status = {"a": None}
    watched = step("a", limit=60.0, least=20.0, read=lambda finished: seen.append(finished) or steps.outcome(finished))
    machine.run(tmp_path, 50.0, watched)
    machine.run(tmp_path, 100.0, watched)
    assert [finished.cut_short for finished in seen] == [True, False]


# What it checks on the GPU, by the CPU's kernels


def replays_what_it_saw(call: Callable) -> Callable:
    """A graph that was captured of other buffers than those that change."""
    return lambda: None


@pytest.mark.parametrize("case", graph.CASES, ids=lambda case: case.name)
def test_a_graph_has_to_follow_its_buffers(case):
    rows = graph.check(case, "cpu", "cpu", lambda call: call)
    assert [row["status"] for row in rows] == ["ok"] * graph.REPLAYS
    assert "WRONG" in {row["status"] for row in graph.check(case, "cpu", "cpu", replays_what_it_saw)}


def test_the_replays_have_pads_and_other_slots_each_time():
    fresh = [graph._fresh_layer()["state_indices"].tolist() for _ in range(20)]
    assert all(-1 in slots for slots in fresh)
    assert len(set(map(tuple, fresh))) == 20


def test_cases_fail_where_a_kernel_is_wrong(tmp_path, monkeypatch, capsys):
    file = tmp_path / "rows.json"
    arguments = ["--backend", "cpu", "--device", "cpu", "--only", "e", "--rows", str(file)]
    monkeypatch.setattr(cases, "LENGTHS", {4: 7})
    assert cases.main(arguments) == 0
    names = [row["case"] for row in json.loads(file.read_text())["rows"]]
    assert {"memory_decode", "attention_correction_norm_rope", "delta_update packed, masked"} <= set(names)
    right = cases.delta_step
    monkeypatch.setattr(
        cases, "delta_step", lambda *x, backend, **y: right(*x, backend=backend, **y) * (backend != "cpu")
    )
    assert cases.main([*arguments[:4], "--only", "delta_step"]) == 1
    assert "WRONG" in capsys.readouterr().out
