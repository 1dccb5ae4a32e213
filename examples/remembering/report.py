"""Results as Markdown."""

from __future__ import annotations

from typing import Any

from .statistics import apart


def share(value: dict[str, Any]) -> str:
    return f"{value['mean']:.1%} [{value['low']:.1%}, {value['high']:.1%}]"


def nats(value: dict[str, Any]) -> str:
    return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def markdown(results: dict[str, Any]) -> str:
    """A table for each set of questions, and one of the price."""
    parts = []
    for name, frozen in results["frozen"].items():
        rows = [[way, *_cells(name, value), ""] for way, value in frozen.items()]
        for memory in results["memories"]:
            ways = memory["answers"][name]
            for way, value in ways.items():
                verdict = _verdict(ways, frozen) if way.endswith("state only") else ""
                rows.append([f"{memory['name']}: {way.removeprefix('memory, ')}", *_cells(name, value), verdict])
        parts.append(f"**{name}**\n\n" + table(["", "right answers", "answer's log-likelihood", "beats both"], rows))
    rows = []
    for memory in results["memories"]:
        for way, value in memory["price"].items():
            change = value.get("change_percent")
            told = "" if change is None else "{mean:+.2f} % [{low:+.2f}, {high:+.2f}]".format(**change)
            rows.append([f"{memory['name']}: {way}", nats(value["log_likelihood"]), told])
    parts.append("**unrelated text**\n\n" + table(["", "log-likelihood of a token", "change"], rows))
    return "\n\n".join(parts)


def _cells(name: str, value: dict[str, Any]) -> list[str]:
    free = "dialogue" in name  # no choices
    return ["" if free else share(value["accuracy"]), nats(value["log_likelihood"])]


def _verdict(ways: dict[str, Any], frozen: dict[str, Any]) -> str:
    """What of the state's answers is better than both frozen and control, with intervals that do not overlap."""
    others = (frozen["frozen, no context"], ways["memory, another passage's state"])
    names = {"accuracy": "accuracy", "log_likelihood": "likelihood"}
    won = [
        text
        for key, text in names.items()
        if all(apart(ways["memory, state only"][key], other[key]) for other in others)
    ]
    return ", ".join(won) or "no"
