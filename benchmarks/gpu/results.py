"""`python -m benchmarks.gpu.results [FOLDER]`: the README's GPU table, from what the parts left in FOLDER; with --write
in the README itself, and the plots in FOLDER. What has not run is marked so."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import report
from ..machine import ROOT
from ..registry import Shape
from ..runner import Row
from .steps import OK, PROVENANCE

RESULTS = ROOT / "benchmarks" / "results" / "gpu"
README = ROOT / "README.md"
BEGIN, END = "<!-- benchmarks.gpu.results: begin -->", "<!-- benchmarks.gpu.results: end -->"
NOT_RUN = "not run yet"
SCAN, TRAINING = "delta_update forward", "delta_update forward+backward"
UPSTREAM = "upstream-triton"


@dataclass(frozen=True)
class Line:
    """Of the table: ours beside another implementation, on one shape."""

    operation: str
    tokens: int
    batch: int = 1
    rank: int = 8
    ours: str = "ours (triton)"
    other: str = UPSTREAM


WITH, FROZEN = "with memory (triton)", "frozen"
LINES = (
    *(Line(operation, tokens) for operation in (SCAN, TRAINING) for tokens in (128, 8192, 1 << 20)),
    *(Line(operation, 8192, batch=64) for operation in (SCAN, TRAINING)),
    *(Line(SCAN, 8192, rank=rank) for rank in (4, 16)),
    *(Line(operation, 8192, ours="ours (cuda)") for operation in (SCAN, TRAINING)),
    *(Line("delta_step", 1, batch=batch, other="pytorch") for batch in (1, 256)),
    *(
        Line(f"layer {model}", tokens, ours=WITH, other=FROZEN)
        for model in ("Qwen3-4B", "SmolLM3-3B")
        for tokens in (1, 8192)
    ),
    *(Line("model Qwen3-4B", tokens, ours="ours", other=FROZEN) for tokens in (1, 8192)),
)


def load(folder: Path) -> dict[str, list[dict]]:
    """The steps of each part that has left a file."""
    return {path.stem: json.loads(path.read_text())["steps"] for path in sorted(folder.glob("*.json"))}


def rows(parts: dict[str, list[dict]]) -> Iterator[dict]:
    """Timed rows of `bench`. A rehearsal's are of a CPU and no figures of a GPU."""
    for step in parts.get("bench", ()):
        for row in step["rows"]:
            if "shape" in row and row["shape"]["device"] == "cuda":
                yield row


def found(all_rows: Sequence[dict], line: Line, implementation: str) -> dict | None:
    wanted = {"tokens": line.tokens, "batch": line.batch, "rank": line.rank, "mode": "standard", "gates": "row"}
    for row in all_rows:
        names = (row["operation"], row["implementation"])
        if names == (line.operation, implementation) and wanted.items() <= row["shape"].items():
            return row
    return None


def cell(row: dict | None) -> str:
    """The median and the spread of the middle half; or why there is none."""
    if row is None:
        return NOT_RUN
    if row["seconds"] is None:
        return row["status"] if row["status"] != "not run" else f"not run: {row['note']}"
    return f"{report.scaled(1e9 * row['seconds'], ('ns', 'µs', 'ms', 's'))} ± {50 * row['spread']:.1f} %"


def table(parts: dict[str, list[dict]]) -> str:
    all_rows = list(rows(parts))
    lines = ["| | B | T | R | ours | | beside | | times | kept |", "|---" * 10 + "|"]
    for line in LINES:
        ours, other = (found(all_rows, line, name) for name in (line.ours, line.other))
        timed = ours and other and ours["seconds"] and other["seconds"]
        times = f"{other['seconds'] / ours['seconds']:.3g}" if timed else "–"
        lines.append(
            f"| {line.operation} | {line.batch} | {line.tokens:,} | {line.rank} | {line.ours} | {cell(ours)} "
            f"| {line.other} | {cell(other)} | {times} | {_kept(ours, other)} |"
        )
    return "\n".join([*lines, "", *_proofs(parts), "", _whence(all_rows)])


def _kept(ours: dict | None, other: dict | None) -> str:
    """For backward, beyond the inputs: ours, and the other's."""
    sizes = [row["kept_bytes"] for row in (ours, other) if row and row["kept_bytes"] is not None]
    return " / ".join(report.scaled(size, ("B", "KiB", "MiB", "GiB"), 1024.0) for size in sizes) or "–"


def _proofs(parts: dict[str, list[dict]]) -> list[str]:
    """What each of the other parts says."""
    lines = ["| part | |", "|---|---|"]
    for part in ("build", "test", "sanitize", "graph", "profile"):
        steps = [step for step in parts.get(part, ()) if step["driver"]]
        said = [f"{x['name']}: {x['status']}" + (f" ({x['note']})" if x["note"] else "") for x in steps]
        if steps and all(step["status"] == OK for step in steps) and part != "test":
            said = [f"all {len(steps)} steps ok"]
        lines.append(f"| `{part}` | {'; '.join(said) or NOT_RUN} |")
    return lines


def _whence(all_rows: Sequence[dict]) -> str:
    """Of all rows; where they come from several machines or commits, all of them."""
    if not all_rows:
        return "No row of this table has run on a GPU yet."
    told = [f"{name} {', '.join(sorted({str(row[name]) for row in all_rows}))}" for name in PROVENANCE]
    return f"bfloat16, {'; '.join(told)}. Medians with half the interquartile range, from interleaved runs."


def as_row(row: dict) -> Row:
    """For benchmarks.report, whose plot this is."""
    names = {name for name in Row.__dataclass_fields__ if name != "shape"}
    shape = row["shape"] | {"dtype": getattr(torch, row["shape"]["dtype"])}
    return Row(shape=Shape(**shape), **{name: row[name] for name in names})


def plot(parts: dict[str, list[dict]], folder: Path) -> Path | None:
    """Scans and steps, a panel each; None where nothing was timed."""
    timed = [row for row in rows(parts) if row["seconds"] is not None and row["shape"]["mode"] == "standard"]
    timed = [as_row(row) for row in timed if row["operation"] in (SCAN, TRAINING, "delta_step")]
    timed = [row for row in timed if row.shape.rank == 8]
    if not timed:
        return None
    report.plot({"device": next(rows(parts))["device"]}, timed, folder / "gpu.png")
    return folder / "gpu.png"


def written(text: str, made: str) -> str:
    """The README with the table in its place."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{made}\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.results", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=RESULTS)
    parser.add_argument("--write", action="store_true", help="in README.md, and plots in the folder")
    options = parser.parse_args(arguments)
    parts = load(options.folder)
    made = table(parts)
    print(made)
    if options.write:
        README.write_text(written(README.read_text(), made))
        plot(parts, options.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
