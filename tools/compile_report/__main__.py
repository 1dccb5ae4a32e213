"""Print the resources of all kernels and the estimates, and exit with 1 on a spill. This compiles for some minutes."""

from __future__ import annotations

import argparse
import sys

from . import cases
from .compiler import Row
from .estimate import estimate


def report() -> list[Row]:
    """Compile the kernels of all operations for each arch and usual rank."""
    return cases.scan_report() + cases.layer_report() + cases.correction_report()


def main() -> int:
    rows = report()
    print(f"{'kernel':22}{'rank':>6}{'arch':>8}{'registers':>11}{'stack':>7}{'spills st/ld':>14}{'shared':>8}  loops")
    for row in rows:
        spills = f"{row.spill_stores}/{row.spill_loads}"
        arch, loops = f"sm_{row.arch}", " ".join(map(str, row.loops))
        print(f"{row.kernel:22}{row.rank:>6}{arch:>8}{row.registers:>11}{row.stack:>7}{spills:>14}", end="")
        print(f"{row.shared:>8}  {loops}")
    print("\nEstimated, not measured: forward on sm_90, B = H = 1, 16 bits.")
    print("Chain and instructions are cycles per token, times are microseconds without launches.")
    print(f"{'rank':>6}{'T':>8}{'chain':>8}{'instructions':>14}{'plain':>10}{'chunked':>10}{'byte floor':>12}")
    for tokens in (256, 8192, 1 << 20):
        for x in estimate([row for row in rows if row.arch == 90], tokens):
            times = f"{x.plain:>10.1f}{x.chunked:>10.1f}{x.byte_floor:>12.2f}"
            print(f"{x.rank:>6}{x.tokens:>8}{x.chain:>8}{x.instructions:>14}{times}")
    return int(any(row.spills for row in rows))


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m tools.compile_report", description=__doc__).parse_args()
    sys.exit(main())
