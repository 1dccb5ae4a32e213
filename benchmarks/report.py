"""The table, the JSON file and the plot."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from .runner import Row

LEAST_RESIDENT_BYTES = 2**16  # smaller increases of the resident size are not reliable: see measure.peak_memory
COLUMNS = (
    "implementation", "B", "T", "median", "spread", "tokens/s", "ns/token", "GB/s", "of floor", "memory", "kept",
    "error", "speed", "timed with",
)  # fmt: skip


def scaled(value: float | None, units: Sequence[str], step: float = 1000.0) -> str:
    """Format a value, given in the first unit, with three digits and the largest unit that keeps it at least 1."""
    if value is None:
        return "-"
    index = 0
    while abs(value) >= step and index < len(units) - 1:
        value, index = value / step, index + 1
    return f"{_digits(value)} {units[index]}".rstrip()


def _digits(value: float) -> str:
    """Format a number with three significant digits and without an exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, 6)}f}"


def _cells(row: Row) -> tuple[str, ...]:
    timings = row.timings
    seconds = None if row.seconds is None else row.seconds * 1e9
    median = scaled(seconds, ("ns", "µs", "ms", "s")) if row.status == "ok" else row.status
    return (
        row.implementation,
        f"{row.shape.batch}",
        f"{row.shape.tokens}",
        median,
        "-" if timings["spread"] is None else f"{100 * timings['spread']:.1f} %",
        scaled(timings["tokens_per_second"], ("", "k", "M", "G")),
        "-" if timings["ns_per_token"] is None else _digits(timings["ns_per_token"]),
        "-" if timings["gb_per_second"] is None else _digits(timings["gb_per_second"]),
        "-" if timings["share_of_floor"] is None else f"{_digits(100 * timings['share_of_floor'])} %",
        _memory(row),
        scaled(row.kept_bytes, ("B", "KiB", "MiB", "GiB"), 1024.0),
        "-" if row.error is None else f"{row.error:.1e}",
        "-" if row.speed is None else f"{_digits(row.speed)}x",
        row.method or "-",
    )


def _memory(row: Row) -> str:
    if row.shape.device == "cpu" and row.peak_memory_bytes is not None and row.peak_memory_bytes < LEAST_RESIDENT_BYTES:
        return "< 64 KiB"
    return scaled(row.peak_memory_bytes, ("B", "KiB", "MiB", "GiB"), 1024.0)


def table(rows: Sequence[Row]) -> str:
    """Format the rows as one table per operation, followed by notes and by what was not run."""
    lines: list[str] = []
    for (operation, kind), group in groupby(rows, key=lambda row: (row.operation, _kind(row))):
        ran = [row for row in group if row.status != "not run"]
        if not ran:
            continue
        cells = [COLUMNS, *map(_cells, ran)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines += ["", f"{operation}: {kind}"]
        for line in cells:
            first, *others = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            lines.append("  ".join([first.strip().ljust(widths[0]), *others]).rstrip())
    return "\n".join([*lines, "", *_remarks(rows)])


def _kind(row: Row) -> str:
    """Describe a row's shape without B and T, which are columns."""
    return str(row.shape).replace(f"B={row.shape.batch} T={row.shape.tokens} ", "")


def _remarks(rows: Sequence[Row]) -> list[str]:
    """Return one line for each note or reason, with the operations and lengths that it applies to."""
    remarks: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.note:
            kind = {"not run": "not run", "failed": "failed"}.get(row.status, "note")
            remarks.setdefault((kind, row.implementation, row.note), []).append(row)
    lines = []
    for (kind, name, note), where in sorted(remarks.items(), key=lambda item: item[0][0]):
        everywhere = len(where) == sum(row.implementation == name for row in rows)
        lines.append(f"{kind}: {name}: {note}" + ("" if everywhere else f" ({_cases(where)})"))
    return lines


def _cases(rows: Sequence[Row]) -> str:
    lengths: dict[str, list[str]] = {}
    for row in rows:
        lengths.setdefault(row.operation, []).append(str(row.shape.tokens))
    return "; ".join(f"{operation}, T = {', '.join(each)}" for operation, each in lengths.items())


def as_json(header: dict, rows: Sequence[Row]) -> str:
    return json.dumps({"header": header, "rows": [json_row(row) for row in rows]}, indent=1, ensure_ascii=False) + "\n"


def json_row(row: Row) -> dict:
    """Convert a row to a dict for JSON, including the figures derived from its time."""
    fields = asdict(row) | row.timings
    fields["shape"] = fields["shape"] | {"dtype": row.shape.dtype_name}
    return {name: _finite(value) for name, value in fields.items()}


def _finite(value: object) -> object:
    """Replace NaN and infinity, which JSON lacks, by strings."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def plot(header: dict, rows: Sequence[Row], path: Path) -> None:
    """Plot the time per token, with one panel for each operation.

    The horizontal axis is T, with a panel for each B; if there are more batch sizes than lengths, it is B, with a panel
    for each T.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in rows if row.seconds is not None]
    names = list(dict.fromkeys(row.implementation for row in timed))
    panels_of = _panels(timed)
    count = max(1, len(panels_of))
    columns = min(count, 4)
    size = (6.2 * columns, 5 * -(-count // columns))
    figure, panels = pyplot.subplots(
        -(-count // columns), columns, figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for panel, (title, across, here) in zip(panels.flat, panels_of, strict=False):
        _draw(panel, title, across, here, names)
    for panel in panels.flat[len(panels_of) :]:
        panel.set_axis_off()
    panels[0][0].set_ylabel("ns per token (less is better)")
    if panels_of:
        shown = {
            label: line for panel in panels.flat for line, label in zip(*panel.get_legend_handles_labels(), strict=True)
        }
        figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=3, frameon=False)
        figure.suptitle(f"{header['device']}: {_kind(timed[0])}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def _panels(timed: Sequence[Row]) -> list[tuple[str, str, list[Row]]]:
    """Return for each panel its title, the size on its horizontal axis ("tokens" or "batch"), and its rows."""
    panels = []
    for operation in dict.fromkeys(row.operation for row in timed):
        here = [row for row in timed if row.operation == operation]
        lengths, batches = {row.shape.tokens for row in here}, {row.shape.batch for row in here}
        across, fixed = ("batch", "tokens") if len(batches) > len(lengths) else ("tokens", "batch")
        for value in sorted({getattr(row.shape, fixed) for row in here}):
            title = f"{operation}, {'T' if fixed == 'tokens' else 'B'} = {value}"
            panels.append((title, across, [row for row in here if getattr(row.shape, fixed) == value]))
    return panels


def _draw(panel, title: str, across: str, here: Sequence[Row], names: Sequence[str]) -> None:
    from matplotlib.ticker import FuncFormatter

    size = lambda row: getattr(row.shape, across)  # noqa: E731
    for index, name in enumerate(names):
        points = sorted((size(row), row.timings["ns_per_token"]) for row in here if row.implementation == name)
        if points:
            panel.loglog(*zip(*points, strict=True), "os^Dvp*X"[index % 8] + "-", color=f"C{index}", label=name)
    floor = sorted({(size(row), 1e9 * row.floor_seconds / row.tokens) for row in here})
    panel.loglog(*zip(*floor, strict=True), "k:", label="every byte moved once, at copy bandwidth")
    sizes = [x for x, _ in floor]
    panel.set_xticks(sizes, [f"{x:,}" if x < 10_000 else f"{x // 1024:,} Ki" for x in sizes])
    panel.minorticks_off()
    panel.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:,.0f}" if number >= 1 else f"{number}"))
    panel.grid(alpha=0.3)
    panel.set(title=title, xlabel="tokens (T)" if across == "tokens" else "sequences (B)")
