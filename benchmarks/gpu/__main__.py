"""`python -m benchmarks.gpu PART ...`: builds, proves, times and profiles the package on this machine's GPU.

Needs python3, torch with CUDA, Triton and nvcc; no network. A call takes --seconds at most and then says what is left:
call again, and it goes on there. Each part leaves PART.json in the folder --out, with every row's device, driver,
versions, commit and command; what has succeeded there is not run again. `test` needs pytest, hypothesis and numpy
besides, `bench` what it compares with in .peers/ or on PYTHONPATH (upstream's `deltamem`, `fla`).

Exit status: 0 all is done and right, 1 something is wrong or failed, 2 a part cannot run here, 3 there is more to do.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from .. import machine
from . import plan
from .steps import CANNOT, EXIT, OK, WORST_LAST, Budget, Execute, Record, execute, run_part

OUT = machine.ROOT / ".benchmarks" / "gpu"
MOST_SECONDS = 460.0  # torch is imported before, and a process that is stopped may take ten to end


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"of {', '.join(plan.PARTS)}; default: all, in this order")
    add("--seconds", type=float, default=MOST_SECONDS, help=f"for this call, up to {MOST_SECONDS:.0f} (the default)")
    add("--again", action="store_true", help="also what has succeeded before")
    add("--out", type=Path, default=OUT, metavar="FOLDER", help="default: .benchmarks/gpu")
    add("--copy", type=Path, default=os.environ.get("OUT"), metavar="FOLDER", help="a second one (default: $OUT)")
    add("--commit", help="what the rows name where there is no git")
    add("--rehearse", action="store_true", help="on the CPU: the steps as far as they run there, smaller")
    add("--list", action="store_true", help="print the steps and their limits, run nothing")
    options = parser.parse_args(arguments)
    options.parts = options.parts or list(plan.PARTS)
    unknown = [part for part in options.parts if part not in plan.PARTS]
    if unknown:
        parser.error(f"PART must be one of {', '.join(plan.PARTS)}, got {', '.join(unknown)}")
    if not 0 < options.seconds <= MOST_SECONDS:
        parser.error(f"--seconds must be over 0 and at most {MOST_SECONDS:.0f}, got {options.seconds:g}")
    if options.rehearse and options.out == OUT:
        options.out = OUT.with_name("rehearsal")
    return options


def main(
    arguments: Sequence[str] | None = None,
    execute: Execute = execute,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    options = parse(sys.argv[1:] if arguments is None else list(arguments))
    budget = Budget(options.seconds, clock)
    target = plan.Target("cpu" if options.rehearse else "cuda")
    if options.list:
        for part in options.parts:
            for step in plan.steps(part, target):
                print(f"{part}: {step.name}: at most {step.limit:.0f} s: {step.as_typed()}")
        return 0
    worst, provenance = OK, None
    for part in options.parts:
        reason = plan.why_not(part, target)
        if reason:
            print(f"{part}: cannot run: {machine.without_paths(reason)}")
            status = CANNOT
        else:
            provenance = provenance or machine.provenance(target.device, options.commit)
            record = Record(part, options.out, options.copy and Path(options.copy))
            planned = plan.steps(part, target)
            status = run_part(planned, record, budget, provenance, execute=execute, again=options.again)
        worst = max(worst, status, key=WORST_LAST.index)
    print(f"{worst}; {options.seconds - budget.left():.0f} s")
    return EXIT[worst]


if __name__ == "__main__":
    sys.exit(main())
