"""`python -m benchmarks.gpu` where there is no GPU: its plan, its budget, and what a call leaves for the next one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))  # the harness is not installed

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import cases, plan, store
from benchmarks.gpu.__main__ import BUDGET, main

ORIGIN = {"device": "a GPU", "torch": "2", "triton": "3", "commit": "0123abc", "dirty": False}
SAVES = "from benchmarks.gpu import store; store.save({'case': 'measured', 'status': 'ok'}); "


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Run main() on the steps given, with the folder of this test: the exit status and the rows."""
    monkeypatch.setattr(command.machine, "provenance", lambda device, commit: dict(ORIGIN))
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "FOLDER", tmp_path / "folder")

    def run(*steps: plan.Step, words: tuple[str, ...] = ()) -> tuple[int, list[dict]]:
        parts = {part: [step for step in steps if step.part == part] for part in dict.fromkeys(s.part for s in steps)}
        monkeypatch.setattr(plan, "PARTS", {part: lambda part, rehearse: parts[part] for part in parts})
        status = main(["--out", str(tmp_path / "out"), *words])
        return status, store.read(tmp_path / "out" / store.ROWS)

    return run


def step(name: str, program: str = "", part: str = "scan", seconds: int = 60, **fields) -> plan.Step:
    return plan.Step(part, name, (sys.executable, "-c", program), seconds, **fields)


# The plan


def test_the_first_call_fits_into_ten_minutes():
    assert sum(map(plan.seconds, plan.FIRST_CALL)) <= BUDGET <= 600 - 20
    assert list(plan.PARTS)[: len(plan.FIRST_CALL)] == list(plan.FIRST_CALL)
    assert plan.FIRST_CALL[:5] == ("build", "graph", "scan", "prefill", "decode")


@pytest.mark.parametrize("rehearse", [False, True])
@pytest.mark.parametrize("part", plan.PARTS)
def test_each_step_has_a_name_of_its_own_and_fits_into_a_call(part, rehearse):
    planned = plan.steps(part, rehearse)
    assert len({each.name for each in planned}) == len(planned) > 0
    assert all(0 < each.seconds <= BUDGET for each in planned)


def test_every_case_is_in_the_plan():
    planned = {(part, each.name) for part in plan.PARTS for each in plan.steps(part)}
    assert {(case.part, case.name) for case in cases.CASES} <= planned


def test_listing_needs_no_pytest():
    program = "import sys; sys.modules |= dict.fromkeys(['pytest', 'hypothesis', 'matplotlib']); "
    program += "from benchmarks.gpu.__main__ import main; main(['--list'])"
    done = subprocess.run([sys.executable, "-c", program], cwd=plan.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "scan: at most" in done.stdout
    assert "test_parity.py: at most 240 s (cannot run here: needs the Python packages pytest" in done.stdout


def test_the_suite_says_which_packages_it_lacks(monkeypatch):
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: None if name == "pytest" else name)
    assert {each.why_not for each in plan.steps("test")} == {"needs the Python packages pytest"}


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["build", "everything"])
    assert "got everything" in capsys.readouterr().err


def test_a_commit_is_asked_for_where_there_is_no_git(monkeypatch, tmp_path):
    monkeypatch.setattr(command.machine, "provenance", lambda device, commit: ORIGIN | {"commit": commit})
    with pytest.raises(SystemExit, match="--commit"):
        main(["graph", "--rehearse", "--out", str(tmp_path)])


def test_a_gpu_is_asked_for_unless_it_is_a_rehearsal(monkeypatch, tmp_path):
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU: --rehearse"):
        main(["graph", "--out", str(tmp_path)])


# A call, and the next


def test_a_step_that_dies_loses_no_other(call):
    dies = SAVES + "import os; os.abort()"
    status, rows = call(step("dies", dies), step("later", SAVES), step("other part", part="prefill"))
    assert status == 1
    statuses = {row["step"]: row["status"] for row in rows if "step" in row}
    assert statuses == {"dies": plan.FAILED, "later": plan.OK, "other part": plan.OK}
    measured = [row for row in rows if row.get("case") == "measured"]
    assert len(measured) == 2, "a row is saved before its process ends"
    assert all(ORIGIN.items() <= row.items() for row in rows)


def test_a_killed_call_keeps_its_rows_and_the_next_goes_on(call, tmp_path, monkeypatch):
    executed, execute = [], plan.Step.execute

    def killed_at_b(self, seconds, environment):
        executed.append(self.name)
        if self.name == "b" and executed.count("b") == 1:
            with Path(environment[store.FILE]).open("a") as file:
                file.write('\n{"case": "cut o')  # a row that was being written
            raise KeyboardInterrupt
        return execute(self, seconds, environment)

    monkeypatch.setattr(plan.Step, "execute", killed_at_b)
    steps = step("a", SAVES), step("b", SAVES), step("compiles", part="build")
    with pytest.raises(KeyboardInterrupt):
        call(*steps)
    kept = store.read(tmp_path / "out" / store.ROWS)
    assert [row.get("step") or row["case"] for row in kept] == ["measured", "a"]
    status, rows = call(*steps)
    assert (status, executed) == (0, ["a", "b", "b", "compiles"])
    assert len([row for row in rows if row.get("case") == "measured"]) == 2
    call(*steps)
    assert executed[4:] == ["compiles"], "what compiles runs in each call, the rest once"
    call(*steps, words=("--again",))
    assert executed[5:] == ["a", "b", "compiles"]


def test_another_commit_runs_again(call, monkeypatch):
    call(step("a"))
    monkeypatch.setattr(command.machine, "provenance", lambda device, commit: ORIGIN | {"commit": "another"})
    _, rows = call(step("a"))
    assert [row["commit"] for row in rows] == ["0123abc", "another"]


def test_a_call_ends_with_its_budget(call, capsys):
    slow = step("slow", "import time; time.sleep(60)", seconds=2)
    status, rows = call(step("long", seconds=40), slow, words=("--budget", "5"))
    assert status == 3
    assert "no time was left for scan: long" in capsys.readouterr().out
    assert [(row["step"], row["status"]) for row in rows] == [("slow", plan.STOPPED)]
    assert rows[0]["took"] < 5


def test_what_cannot_run_says_why(call):
    status, rows = call(step("a", why_not="there is no tool"))
    assert (status, rows[0]["status"], rows[0]["note"]) == (2, plan.NOT_RUN, "there is no tool")


def test_a_stopped_step_ends_with_its_children(tmp_path):
    file = tmp_path / "alive"
    shell = ("sh", "-c", f"(sleep 1; touch '{file}') & echo said; wait")
    assert plan.Step("scan", "a", shell, 1).execute(0.3, {}) == (None, "said\n")
    subprocess.run(["sleep", "1.2"], check=True)
    assert not file.exists()


@pytest.mark.parametrize(
    ("status", "output", "expected"),
    [
        (0, "========= ERROR SUMMARY: 0 errors", plan.OK),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", plan.OK),
        (77, "========= ERROR SUMMARY: 2 errors", plan.FAILED),
        (0, "========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)", plan.FAILED),
        (0, "right", plan.FAILED),  # it did not watch
        (1, "WRONG\n========= ERROR SUMMARY: 0 errors", plan.FAILED),
        (None, "", plan.STOPPED),
        (1, "========= Error: Device not supported. Please refer to the documentation", plan.NOT_RUN),
    ],
)
def test_what_a_sanitizer_says(status, output, expected):
    assert plan.sanitizer_verdict(status, output)[0] == expected


def test_what_pytest_says():
    assert plan.suite_verdict(0, "..\n2 passed, 1 skipped in 3s\n") == (plan.OK, "2 passed, 1 skipped in 3s")
    assert plan.suite_verdict(1, "1 failed in 3s\n") == (plan.FAILED, "exit status 1: 1 failed in 3s")


# What travels


def test_compiled_kernels_travel_to_another_folder(tmp_path, monkeypatch):
    """Compiled for sm_90, packed in pieces, and found again by Triton where the cache's old folder does not exist."""
    monkeypatch.setattr(store, "PIECE_BYTES", 4096)
    program = """
import sys, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernel import copy
source = ASTSource(copy, {"x": "*fp32", "y": "*fp32"}, {})
kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32))
print(len(kernel.asm["cubin"]))
"""
    (tmp_path / "kernel.py").write_text(
        "import triton\nimport triton.language as tl\n\n@triton.jit\ndef copy(x, y):\n    tl.store(y, tl.load(x))\n"
    )

    def compile_in(cache: Path, compiler: bool = True) -> str:
        without = "import triton.backends.nvidia.compiler as c\nc.CUDABackend.make_cubin = None\n"
        environment = plan.os.environ | {"TRITON_CACHE_DIR": str(cache / "triton"), "PYTHONPATH": str(tmp_path)}
        environment.pop("TRITON_INTERPRET", None)
        done = subprocess.run(
            [sys.executable, "-c", program if compiler else without + program],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = compile_in(tmp_path / "cache")
    store.pack(tmp_path / "cache", tmp_path)
    assert len(list(tmp_path.glob(f"{store.ARCHIVE}.*"))) > 1
    (tmp_path / "cache").rename(tmp_path / "gone")
    assert store.unpack(tmp_path, tmp_path / "elsewhere")
    assert compile_in(tmp_path / "elsewhere", compiler=False) == first
    assert not store.unpack(tmp_path / "elsewhere", tmp_path / "nothing")


def test_a_call_continues_from_what_it_is_given(call, tmp_path):
    (tmp_path / "folder" / "cache" / "torch").mkdir(parents=True)
    (tmp_path / "folder" / "cache" / "torch" / "library.so").write_text("compiled")
    call(step("a"))
    (tmp_path / "out").rename(tmp_path / "given")
    (tmp_path / "folder").rename(tmp_path / "another machine's")
    _, rows = call(step("a"), step("b"), words=("--given", str(tmp_path / "given")))
    assert [row["step"] for row in rows] == ["a", "b"]
    assert (tmp_path / "folder" / "cache" / "torch" / "library.so").read_text() == "compiled"


# The rehearsal


def test_a_rehearsal_leaves_rows_and_a_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "CASES", [case for case in cases.CASES if case.name == "memory, N=256"])
    monkeypatch.setattr(command, "FOLDER", tmp_path / "folder")
    assert main(["graph", "decode", "--rehearse", "--commit", "0123abc", "--out", str(tmp_path)]) == 0
    rows = store.read(tmp_path / store.ROWS)
    graphs = [row for row in rows if row["part"] == "graph" and "case" in row]
    assert {(row["implementation"], row["status"]) for row in graphs} == {("triton", "ok"), ("cpu", "ok")}
    timed = {row["implementation"]: row for row in rows if row.get("seconds")}
    assert {"ours (cpu)", "ours (cpu), 16-bit weights", "ours (reference)", "ours (cpu), again"} <= set(timed)
    low, median, high = timed["ours (reference)"]["ratio"]
    assert 1 < low <= median <= high
    assert all(row["rehearsal"] and row["commit"] and row["torch"] and row["device"] for row in rows)
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")
    assert "| decode: memory, N=256 | ours (cpu) |" in capsys.readouterr().out
    assert json.loads((tmp_path / store.ROWS).read_text().splitlines()[-1]) == rows[-1]
