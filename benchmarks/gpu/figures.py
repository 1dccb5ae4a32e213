"""The table and the plot of what was timed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .. import report

UNITS = ("ns", "µs", "ms", "s")


def latest(rows: Sequence[dict]) -> dict[tuple[str, str, str], dict]:
    """The last row of each variant of each case. A case that ran twice has its newer figures."""
    return {(row["part"], row["case"], row["implementation"]): row for row in rows if "seconds" in row}


def table(rows: Sequence[dict]) -> str:
    """A line for each variant: the median time, and the median of its paired ratios to the case's first variant, each
    with the range of its middle half."""
    lines = ["| case | variant | time | middle half | times the first | middle half |", "|---" * 6 + "|"]
    for (part, case, variant), row in latest(rows).items():
        cells = [f"{part}: {case}", variant, row.get("note") or row["status"], "", "", ""]
        if row["seconds"] is not None:
            cells[2] = report.scaled(1e9 * row["seconds"], UNITS)
            cells[3] = " to ".join(report.scaled(1e9 * x, UNITS) for x in row["quartiles"])
        if row.get("ratio"):
            low, median, high = row["ratio"]
            cells[4:] = f"{median:.3g}", f"{low:.3g} to {high:.3g}"
        lines.append(f"| {' | '.join(cells)} |")
    origins = {tuple(str(row[name]) for name in ("device", "torch", "triton", "commit")) for row in rows}
    return "\n".join([*lines, "", *("; ".join(origin) for origin in sorted(origins))])


def plot(rows: Sequence[dict], path: Path) -> bool:
    """Draw a panel for each case, with the median and the middle half of each variant. Return False if nothing was
    timed or matplotlib is missing."""
    timed = [
        (key, row) for key, row in latest(rows).items() if row["seconds"] is not None and row["part"] != "ceilings"
    ]
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    cases = list(dict.fromkeys(key[:2] for key, _ in timed))
    if not cases:
        return False
    height = sum(0.6 + 0.25 * sum(key[:2] == case for key, _ in timed) for case in cases)
    figure, panels = pyplot.subplots(len(cases), figsize=(9, 1 + height), squeeze=False, layout="constrained")
    for panel, case in zip(panels.flat, cases, strict=True):
        here = [(key[2], row) for key, row in timed if key[:2] == case]
        medians = [1e6 * row["seconds"] for _, row in here]
        spread = [[1e6 * abs(row["quartiles"][i] - row["seconds"]) for _, row in here] for i in (0, 1)]
        panel.errorbar(medians, [name for name, _ in here], xerr=spread, fmt="o", capsize=4)
        panel.set_xscale("log")
        panel.margins(y=0.2)
        panel.grid(axis="x", alpha=0.3)
        panel.invert_yaxis()
        panel.set(title=": ".join(case), xlabel="µs")
    figure.suptitle("; ".join(sorted({row["device"] for _, row in timed})))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
