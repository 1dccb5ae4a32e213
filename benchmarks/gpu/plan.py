"""The parts of a run, in order of worth, and the steps of each: a process with a limit of seconds."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from ..machine import ROOT
from .cases import CASES

OK, FAILED, NOT_RUN, STOPPED = "ok", "failed", "not run", "stopped"
AT_ONCE = {"build": 3, "test": 4}
"""How many steps of a part run at the same time. Steps that are timed run alone."""
REHEARSAL_SECONDS = 240  # whatever the step: a machine that tests the script may be slow
SANITIZERS = (("memcheck", "triton"), *((tool, "cuda") for tool in ("memcheck", "racecheck", "initcheck", "synccheck")))


def verdict(status: int | None, output: str) -> tuple[str, str]:
    """Status and note of a step, from its process's exit status (None if it was stopped) and output."""
    last = next((line for line in reversed(output.splitlines()) if line.strip()), "no output")
    if status is None:
        return STOPPED, f"stopped at its limit: {last}"
    return (OK, "") if status == 0 else (FAILED, f"exit status {status}: {last}")


def sanitizer_verdict(status: int | None, output: str) -> tuple[str, str]:
    """compute-sanitizer counts errors in a summary. Without a summary it checked nothing."""
    if "not supported" in output:
        return NOT_RUN, "compute-sanitizer does not support this device"
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", output)
    if status == 0 and (not found or any(map(int, found))):
        return FAILED, f"{found[-1]} errors" if found else "compute-sanitizer wrote no summary"
    return verdict(status, output)


def suite_verdict(status: int | None, output: str) -> tuple[str, str]:
    """pytest's last line counts the tests, also those that were skipped."""
    found, note = verdict(status, output)
    last = output.strip().splitlines()[-1:] or [note]
    return found, last[0].strip("= ") if found == OK else note


@dataclass(frozen=True)
class Step:
    """`why_not` says why the step cannot run on this machine."""

    part: str
    name: str
    command: tuple[str, ...]
    seconds: int
    environment: dict[str, str] = field(default_factory=dict)
    why_not: str | None = None
    verdict: Callable[[int | None, str], tuple[str, str]] = verdict

    def execute(self, seconds: float, environment: dict[str, str]) -> tuple[int | None, str]:
        """Exit status (None if it was stopped after `seconds`) and output. Its children end with it."""
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env=os.environ | environment | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            status = None
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = process.wait(seconds)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            output.seek(0)
            return status, output.read().decode(errors="replace")


def _python(module: str, *words: str) -> tuple[str, ...]:
    return (sys.executable, "-m", module, *words)


def _build(part: str, rehearse: bool) -> list[Step]:
    """The first call of each backend compiles it."""
    backends = ("cpu",) if rehearse else ("cuda", "triton", "cpu")
    return [Step(part, each, _python("benchmarks.gpu.checks", each), 150) for each in backends]


def _graph(part: str, rehearse: bool) -> list[Step]:
    """A rehearsal runs Triton's interpreter."""
    words, environment = ("--graph", "--device", "cpu" if rehearse else "cuda"), {"TRITON_INTERPRET": "1"}
    return [
        Step(part, each, _python("benchmarks.gpu.checks", each, *words), 20, environment if rehearse else {})
        for each in ("triton", "cpu" if rehearse else "cuda")
    ]


def _timed(part: str, rehearse: bool) -> list[Step]:
    words = ("--rehearse",) if rehearse else ()
    return [
        Step(part, case.name, _python("benchmarks.gpu.timing", part, case.name, *words), case.seconds)
        for case in CASES
        if case.part == part
    ]


def _ceilings(part: str, rehearse: bool) -> list[Step]:
    words = ("--rehearse",) if rehearse else ()
    return [Step(part, "copy, product, tiny kernel", _python("benchmarks.gpu.timing", part, *words), 20)]


def _test(part: str, rehearse: bool) -> list[Step]:
    missing = [name for name in ("pytest", "hypothesis", "numpy") if importlib.util.find_spec(name) is None]
    why_not = f"needs the Python packages {', '.join(missing)}" if missing else None
    files = ["test_main.py"] if rehearse else sorted(path.name for path in (ROOT / "tests").glob("test_*.py"))
    words = ("-q", "--tb=short", "-p", "no:cacheprovider", "--seed", "1")
    words += ("-n", "4") if importlib.util.find_spec("xdist") and not rehearse else ()
    return [
        Step(part, name, _python("pytest", f"tests/{name}", *words), 240, {}, why_not, suite_verdict) for name in files
    ]


def _sanitize(part: str, rehearse: bool) -> list[Step]:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")
    why_not = None if sanitizer else "compute-sanitizer is neither on PATH nor in CUDA's folder"
    # Without torch's memory cache each tensor is an allocation of its own, whose ends the sanitizer knows.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    steps = []
    for name, backend in SANITIZERS:
        # torch asks the driver for functions that it may lack, which is no error of a kernel.
        quiet = ("--report-api-errors", "no") if name == "memcheck" else ()
        command = (sanitizer or "compute-sanitizer", "--tool", name, *quiet, "--error-exitcode", "77")
        command += _python("benchmarks.gpu.checks", backend)
        unfit = "compute-sanitizer needs a GPU" if rehearse else why_not
        steps.append(Step(part, f"{name}, {backend}", command, 300, environment, unfit, sanitizer_verdict))
    return steps


PARTS: dict[str, Callable[[str, bool], list[Step]]] = {
    "build": _build,
    "graph": _graph,
    **dict.fromkeys(("scan", "prefill", "decode", "correct"), _timed),
    "ceilings": _ceilings,
    "test": _test,
    "sanitize": _sanitize,
}
FIRST_CALL = tuple(part for part in PARTS if part not in ("test", "sanitize"))
"""These parts fit into one call of ten minutes, even if every step takes all of its time."""


def steps(part: str, rehearse: bool = False) -> list[Step]:
    found = PARTS[part](part, rehearse)
    return [replace(step, seconds=REHEARSAL_SECONDS) for step in found] if rehearse else found


def seconds(part: str) -> float:
    """The longest that a part can take, from its steps' limits."""
    return sum(step.seconds for step in steps(part)) / AT_ONCE.get(part, 1)
