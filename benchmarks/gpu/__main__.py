"""`python -m benchmarks.gpu`: builds, checks and times the package on a GPU, in calls of a few minutes.

It needs torch with CUDA, Triton and nvcc, and no network. A call runs parts in order of worth until its budget is
spent. The folder --out then has rows.jsonl (a line for each result), log.txt, gpu.png, and cache.tar.gz.* with
everything that was compiled. `--given` continues from a copy of that folder, also on another machine: what succeeded at
the same commit does not run again. Exit status: 0 all is ok, 1 something is wrong, 2 something cannot run here, 3 more
is left to run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from .. import machine
from . import figures, plan, store

FOLDER = machine.ROOT / ".benchmarks"
BUDGET = 575.0
TO_START = 60.0
"""A step starts if its limit is left, or this many seconds; it is stopped when the budget is spent."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"of {', '.join(plan.PARTS)}; default: all, in this order")
    add("--budget", type=float, default=BUDGET, help=f"seconds of this call (default: {BUDGET:.0f}, for ten minutes)")
    add("--out", type=Path, metavar="FOLDER", help="default: .benchmarks/gpu")
    add("--given", type=Path, metavar="FOLDER", help="what an earlier call left")
    add(
        "--upstream", type=Path, metavar="FOLDER", default=machine.ROOT / ".peers" / "delta-Mem", help="a clone to time"
    )
    add("--commit", help="the commit that runs, if there is no git here")
    add("--again", action="store_true", help="also what has succeeded before")
    add("--rehearse", action="store_true", help="on the CPU, smaller")
    add("--list", action="store_true", help="print the steps and their limits, and run nothing")
    options = parser.parse_args(arguments)
    unknown = [part for part in options.parts if part not in plan.PARTS]
    if unknown:
        parser.error(f"PART must be one of {', '.join(plan.PARTS)}, got {', '.join(unknown)}")
    options.parts = options.parts or list(plan.PARTS)
    options.out = options.out or FOLDER / ("rehearsal" if options.rehearse else "gpu")
    return options


class Call:
    """One call of the command: its folder, its deadline, and what each of its rows says about where it comes from."""

    def __init__(self, options: argparse.Namespace, origin: dict, deadline: float) -> None:
        self.options, self.origin, self.deadline = options, origin, deadline
        self.rows, self.cache = options.out.resolve() / store.ROWS, FOLDER / "cache"
        self.late: list[str] = []
        self.statuses: list[str] = []
        self._lock = threading.Lock()

    def environment(self) -> dict[str, str]:
        """A rehearsal keeps the folders that this machine compiles into anyway."""
        upstream = [str(self.options.upstream.resolve())] if self.options.upstream.is_dir() else []
        inherited = filter(None, [os.environ.get("PYTHONPATH")])
        variables = {store.FILE: str(self.rows), store.ORIGIN: json.dumps(self.origin)}
        variables["PYTHONPATH"] = os.pathsep.join([*upstream, *inherited])
        if not self.options.rehearse:
            variables |= {"TRITON_CACHE_DIR": f"{self.cache}/triton", "TORCH_EXTENSIONS_DIR": f"{self.cache}/torch"}
        return variables

    def done(self, step: plan.Step) -> bool:
        """Whether the step succeeded before, on the sources as they are. What compiles always runs: a library may be
        missing here."""
        if self.options.again or step.part == "build" or self.origin["dirty"]:
            return False
        wanted = {"part": step.part, "step": step.name, "status": plan.OK, "commit": self.origin["commit"]}
        return any(wanted.items() <= row.items() for row in store.read(self.rows))

    def run(self, step: plan.Step) -> None:
        began = time.monotonic()
        left = self.deadline - began
        if step.why_not:
            status, note = plan.NOT_RUN, step.why_not
        elif left < min(step.seconds, TO_START):
            self.late.append(f"{step.part}: {step.name}")
            return
        else:
            status, note = step.verdict(*self._executed(step, min(step.seconds, left)))
        took = round(time.monotonic() - began, 1)
        row = {"part": step.part, "step": step.name, "status": status, "note": machine.without_paths(note)}
        command = machine.without_paths(shlex.join(step.command))
        with self._lock:
            self.statuses.append(status)
            print(f"{step.part}: {step.name}: {status} ({took:.0f} s) {row['note']}", flush=True)
            store.append(self.rows, row | {"took": took, "command": command} | self.origin)

    def _executed(self, step: plan.Step, seconds: float) -> tuple[int | None, str]:
        status, output = step.execute(seconds, self.environment())
        with self._lock, self.rows.with_name("log.txt").open("a") as log:
            log.write(f"== {step.part}: {step.name}\n{machine.without_paths(output)}\n")
        return status, output

    def run_part(self, part: str) -> None:
        steps = [step for step in plan.steps(part, self.options.rehearse) if not self.done(step)]
        with ThreadPoolExecutor(plan.AT_ONCE.get(part, 1)) as pool:
            list(pool.map(self.run, steps))
        figures.plot(store.read(self.rows), self.rows.with_name("gpu.png"))
        if not self.options.rehearse and self.cache.is_dir():
            store.pack(self.cache, self.rows.parent)


def origin(options: argparse.Namespace) -> dict:
    """What each row names: the device, the versions, the commit and the date."""
    if not options.rehearse and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU: --rehearse runs on the CPU")
    found = machine.provenance("cpu" if options.rehearse else "cuda", options.commit)
    if found["commit"] is None:
        raise SystemExit("there is no git here that knows the commit: give it by --commit")
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return found | {"date": date, "rehearsal": options.rehearse}


def main(arguments: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    options = parse(sys.argv[1:] if arguments is None else arguments)
    if options.list:
        for part in options.parts:
            print(f"{part}: at most {plan.seconds(part):.0f} s")
            for step in plan.steps(part, options.rehearse):
                why_not = f" (cannot run here: {step.why_not})" if step.why_not else ""
                print(f"  {step.name}: at most {step.seconds} s{why_not}")
        return 0
    call = Call(options, origin(options), began + options.budget)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.given and options.given.resolve() != options.out.resolve():
        for file in options.given.iterdir():
            if file.name in (store.ROWS, "log.txt") or file.name.startswith(store.ARCHIVE):
                shutil.copy(file, options.out)
    store.unpack(options.out, call.cache)
    for part in options.parts:
        call.run_part(part)
    print(figures.table(store.read(call.rows)))
    if call.late:
        print(f"no time was left for {'; '.join(call.late)}: call again with --given")
    return _exit_status(call)


def _exit_status(call: Call) -> int:
    if plan.FAILED in call.statuses:
        return 1
    if call.late or plan.STOPPED in call.statuses:
        return 3
    return 2 if plan.NOT_RUN in call.statuses else 0


if __name__ == "__main__":
    sys.exit(main())
