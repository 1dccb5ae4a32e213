"""Results as Markdown."""

from __future__ import annotations

from typing import Any

from .statistics import apart, over_seeds

NO_CONTEXT, STATE_ONLY, CONTROL = "frozen, no context", "memory, state only", "memory, another passage's state"
FREE_TEXT = "dialogue"
"""Sets with this word in their name have free-text answers, for which only the likelihood is meaningful."""


def format_accuracy(x: dict[str, Any]) -> str:
    return f"{100 * x['mean']:.1f} % [{100 * x['low']:.0f}, {100 * x['high']:.0f}]"


def format_nats(x: dict[str, Any]) -> str:
    return f"{x['mean']:.2f} [{x['low']:.2f}, {x['high']:.2f}]"


def format_change(x: dict[str, Any]) -> str:
    return f"{x['mean']:+.2f} % [{x['low']:+.2f}, {x['high']:+.2f}]"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def markdown(results: dict[str, Any]) -> str:
    """Format results as tables of accuracy and likelihood, one column per question set, and a table of the price.

    Memories that differ only in their seed share a row: the mean over seeds, and an interval from the lowest to the
    highest end of the seeds' intervals. A figure is bold if its interval lies entirely above those of the frozen model
    without context and of the control.
    """
    memories = _group_by_settings(results["memories"])
    parts = []
    for key, title, format_cell in (
        ("accuracy", "Right answers", format_accuracy),
        ("log_likelihood", "Log-likelihood of the answer, nats per token", format_nats),
    ):
        sets = [x for x in results["frozen"] if key != "accuracy" or FREE_TEXT not in x]
        ways = list(results["frozen"][sets[0]])
        rows = [[way, *(format_cell(results["frozen"][x][way][key]) for x in sets)] for way in ways]
        for name, seeds in memories.items():
            found = {
                (way, x): over_seeds([memory["answers"][x][way][key] for memory in seeds])
                for way in seeds[0]["answers"][sets[0]]
                for x in sets
            }
            for way in seeds[0]["answers"][sets[0]]:
                cells = []
                for x in sets:
                    others = results["frozen"][x][NO_CONTEXT][key], found[CONTROL, x]
                    better = way == STATE_ONLY and all(apart(found[way, x], other) for other in others)
                    text = format_cell(found[way, x])
                    cells.append(f"**{text}**" if better else text)
                rows.append([f"{name}: {way.removeprefix('memory, ')}", *cells])
        parts.append(f"**{title}**\n\n" + table(["", *sets], rows))
    ways = [way for way in results["memories"][0]["price"] if way != "frozen"]
    rows = [
        [
            way,
            *(
                format_change(over_seeds([x["price"][way]["change_percent"] for x in seeds]))
                for seeds in memories.values()
            ),
        ]
        for way in ways
    ]
    parts.append("**Likelihood of unrelated text, relative to the frozen model**\n\n" + table(["", *memories], rows))
    return "\n\n".join(parts)


def _group_by_settings(memories: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Group memories that differ only in their seed, under the first one's name and the number of seeds."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for memory in memories:
        same = {name: value for name, value in memory["settings"].items() if name != "seed"}
        groups.setdefault(repr(sorted(same.items())), []).append(memory)
    return {f"{x[0]['name']} ({len(x)} seeds)" if len(x) > 1 else x[0]["name"]: x for x in groups.values()}
