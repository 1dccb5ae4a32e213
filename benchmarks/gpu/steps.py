"""A part is a list of steps, each a process of its own; what has succeeded is not run again."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..machine import ROOT, without_paths

OK, FAILED, CANNOT, UNFINISHED = "ok", "failed", "cannot run", "unfinished"
EXIT = {OK: 0, FAILED: 1, CANNOT: 2, UNFINISHED: 3}
"""Also what a step's process says by its own exit status, 0 to 2."""
WORST_LAST = (OK, CANNOT, UNFINISHED, FAILED)
OUTPUT_CHARACTERS = 4000
PROVENANCE = ("device", "driver", "cuda", "nvcc", "torch", "triton", "python", "commit", "dirty")


@dataclass(frozen=True)
class Finished:
    """status: of the process, None if it was stopped; cut_short: before its limit, as the call was over."""

    status: int | None
    output: str
    seconds: float
    rows: Path
    cut_short: bool = False


@dataclass(frozen=True)
class Outcome:
    status: str
    note: str = ""
    rows: list[dict] = field(default_factory=list)


def outcome(finished: Finished) -> Outcome:
    """By the exit status; rows from the JSON file that the process wrote, `{"rows": [...]}`."""
    rows = json.loads(finished.rows.read_text())["rows"] if finished.rows.exists() else []
    last = next((line for line in reversed(finished.output.splitlines()) if line.strip()), "it said nothing")
    if finished.status is None:
        return Outcome(FAILED, f"stopped after {finished.seconds:.0f} s, its limit: {last}", rows)
    status = {0: OK, 2: CANNOT}.get(finished.status, FAILED)
    return Outcome(status, "" if status == OK else last, rows)


@dataclass(frozen=True)
class Step:
    """`{rows}` in the command stands for the file that the process may write, `{keep}` for one that outlives it. The
    limit is in seconds; a step that goes on where it was stopped needs only `least` of them to begin."""

    name: str
    command: tuple[str, ...]
    limit: float = 120.0
    least: float | None = None
    environment: tuple[tuple[str, str], ...] = ()
    read: Callable[[Finished], Outcome] = outcome

    def as_typed(self) -> str:
        """What to type to have it again; the device machine's paths are nobody's business."""
        names = {sys.executable: "python", "{rows}": "ROWS.json", "{keep}": "OUTCOMES.jsonl"}
        words = [names.get(word, word) for word in self.command]
        return without_paths(" ".join([f"{n}={x}" for n, x in self.environment] + [shlex.join(words)]))


Execute = Callable[[Sequence[str], dict[str, str], float], "tuple[int | None, str]"]


def execute(command: Sequence[str], environment: dict[str, str], limit: float) -> tuple[int | None, str]:
    """Exit status and output. At the limit the process is ended with all that it started."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        status = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(limit)
        finally:
            _end(process)
        output.seek(0)
        return status, output.read().decode(errors="replace")


def _end(process: subprocess.Popen) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
            return


class Record:
    """One JSON file for a part, replaced as a whole after each step; copied to a second folder where there is one."""

    def __init__(self, part: str, folder: Path, copy: Path | None = None) -> None:
        self.part, self.folder, self.copy = part, folder, copy
        self.path = folder / f"{part}.json"
        self.steps: dict[str, dict] = {}
        if self.path.exists():
            self.steps = {step["name"]: step for step in json.loads(self.path.read_text())["steps"]}

    def status(self, name: str) -> str | None:
        return self.steps[name]["status"] if name in self.steps else None

    def put(self, step: dict) -> None:
        self.steps[step["name"]] = step
        text = json.dumps({"part": self.part, "steps": list(self.steps.values())}, indent=1, ensure_ascii=False)
        for folder in filter(None, (self.folder, self.copy)):
            folder.mkdir(parents=True, exist_ok=True)
            fresh = folder / f".{self.part}.json"
            fresh.write_text(text + "\n")
            fresh.replace(folder / self.path.name)


class Budget:
    """Seconds of this call, from its beginning."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self._clock, self._end = clock, clock() + seconds

    def left(self) -> float:
        return self._end - self._clock()

    def now(self) -> float:
        return self._clock()


def run_part(
    steps: Sequence[Step],
    record: Record,
    budget: Budget,
    provenance: dict,
    *,
    execute: Execute = execute,
    again: bool = False,
    say: Callable[[str], None] = print,
) -> str:
    """The worst status of all steps. First those that have not been tried, then those that did not succeed."""
    pending = [step for step in steps if again or record.status(step.name) != OK]
    pending.sort(key=lambda step: record.status(step.name) is not None)
    late = []
    for step in pending:
        if budget.left() < (step.least or step.limit):
            late.append(step.name)
            continue
        if again:
            _kept(step, record).unlink(missing_ok=True)
        done = _run(step, record, budget, provenance, execute)
        note = f": {done['note']}" if done["note"] else ""
        say(f"{record.part}: {step.name}: {done['status']} ({done['seconds']:.0f} s){note}")
    if late:
        say(f"{record.part}: no time was left for {', '.join(late)}: call again")
    found = [UNFINISHED] * bool(late) + [record.status(step.name) or UNFINISHED for step in steps]
    return max(found, key=WORST_LAST.index)


def _kept(step: Step, record: Record) -> Path:
    return (record.folder / f"{record.part}-{step.name}.jsonl".replace(" ", "-")).resolve()


def _run(step: Step, record: Record, budget: Budget, provenance: dict, execute: Execute) -> dict:
    began = budget.now()
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        keep = _kept(step, record)
        keep.parent.mkdir(parents=True, exist_ok=True)
        places = {"{rows}": str(rows), "{keep}": str(keep)}
        command = [places.get(word, word) for word in step.command]
        limit = min(step.limit, budget.left())
        status, output = execute(command, dict(step.environment), limit)
        seconds = budget.now() - began
        written = keep if "{keep}" in step.command else rows
        read = step.read(Finished(status, output, seconds, written, status is None and limit < step.limit))
        if record.copy and keep.exists():
            record.copy.mkdir(parents=True, exist_ok=True)
            shutil.copy(keep, record.copy)  # a suite goes on from it
    of_row = {name: provenance.get(name) for name in PROVENANCE} | {"command": step.as_typed()}
    of_row["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    done = {
        "name": step.name,
        "status": read.status,
        "note": without_paths(read.note),
        "seconds": round(seconds, 1),
        "output": without_paths(output[-OUTPUT_CHARACTERS:]),
        "rows": [row | of_row for row in read.rows],
        **of_row,
    }
    record.put(done)
    return done
