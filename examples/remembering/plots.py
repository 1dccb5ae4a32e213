"""Plots as PNG files. matplotlib is imported only when a plot is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

WINDOW = 20


def _axes(columns: int = 1):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(5.5 * columns, 3.6), layout="constrained", squeeze=False)
    for axis in axes[0]:
        axis.grid(alpha=0.3)
    return figure, list(axes[0])


def _save(figure, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def smooth(values: Sequence[float], window: int = WINDOW) -> list[float]:
    """Return the moving average: the mean of each value and up to `window - 1` values before it."""
    return [sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(values))]


def plot_losses(losses: Sequence[float], accuracies: Sequence[float], path: Path) -> None:
    """Plot loss and accuracy against the training step."""
    figure, (left, right) = _axes(2)
    steps = range(1, len(losses) + 1)
    for axis, values, name in ((left, losses, "loss, nats a token"), (right, accuracies, "right answers")):
        axis.plot(steps, values, alpha=0.3, linewidth=0.8)
        axis.plot(steps, smooth(values), color="C0")
        axis.set(xlabel="step", ylabel=name)
    right.set_ylim(0, 1)
    _save(figure, path)


def plot_session(rows: Sequence[dict], path: Path) -> None:
    """Plot recall, likelihood of the answer and norm of the states against the tokens written since.

    There is one line for each memory and dtype of its states.
    """
    figure, axes = _axes(3)
    for memory, dtype in dict.fromkeys((row["memory"], row["state"]) for row in rows):
        mine = [row for row in rows if (row["memory"], row["state"]) == (memory, dtype)]
        tokens = [row["tokens"] for row in mine]
        for axis, name, label in (
            (axes[0], "accuracy", "right answers"),
            (axes[1], "log_likelihood", "answer's log-likelihood, nats"),
            (axes[2], "norm", "norm of the states, mean over layers"),
        ):
            value = [row[name]["mean"] if isinstance(row[name], dict) else row[name] for row in mine]
            axis.plot(tokens, value, marker="o", markersize=3, label=f"{memory}, {dtype}")
            axis.set_xscale("symlog", linthresh=tokens[1])
            axis.set(xlabel="tokens written since", ylabel=label)
            if isinstance(mine[0][name], dict):
                axis.fill_between(tokens, *([row[name][end] for row in mine] for end in ("low", "high")), alpha=0.15)
    axes[0].legend(fontsize="small")
    _save(figure, path)
