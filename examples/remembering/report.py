"""Results as Markdown."""

from __future__ import annotations

from typing import Any

from .statistics import apart, over_seeds

NO_CONTEXT, STATE_ONLY, CONTROL = "frozen, no context", "memory, state only", "memory, another passage's state"
FREE_TEXT = "dialogue"
"""In a set's name: only the likelihood of its answers means something."""


def share(x: dict[str, Any]) -> str:
    return f"{100 * x['mean']:.1f} % [{100 * x['low']:.0f}, {100 * x['high']:.0f}]"


def nats(x: dict[str, Any]) -> str:
    return f"{x['mean']:.2f} [{x['low']:.2f}, {x['high']:.2f}]"


def percent(x: dict[str, Any]) -> str:
    return f"{x['mean']:+.2f} % [{x['low']:+.2f}, {x['high']:+.2f}]"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def markdown(results: dict[str, Any]) -> str:
    """Tables of right answers and of likelihoods, a column for each set of questions, and of the price.

    Memories that differ in the seed alone are one: the mean over seeds, and from the lowest to the highest end of their
    intervals. What is better than the frozen model without context and the control, with intervals apart, is bold.
    """
    memories = _by_settings(results["memories"])
    parts = []
    for key, title, form in (
        ("accuracy", "Right answers", share),
        ("log_likelihood", "Log-likelihood of the answer, nats a token", nats),
    ):
        sets = [x for x in results["frozen"] if key != "accuracy" or FREE_TEXT not in x]
        rows = [[way, *(form(results["frozen"][x][way][key]) for x in sets)] for way in results["frozen"][sets[0]]]
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
                    text = form(found[way, x])
                    cells.append(f"**{text}**" if better else text)
                rows.append([f"{name}: {way.removeprefix('memory, ')}", *cells])
        parts.append(f"**{title}**\n\n" + table(["", *sets], rows))
    ways = [way for way in results["memories"][0]["price"] if way != "frozen"]
    rows = [
        [way, *(percent(over_seeds([x["price"][way]["change_percent"] for x in seeds])) for seeds in memories.values())]
        for way in ways
    ]
    parts.append("**Likelihood of unrelated text, against the frozen model**\n\n" + table(["", *memories], rows))
    return "\n\n".join(parts)


def _by_settings(memories: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """By the name of the first, with how many seeds there are."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for memory in memories:
        same = {name: value for name, value in memory["settings"].items() if name != "seed"}
        groups.setdefault(repr(sorted(same.items())), []).append(memory)
    return {f"{x[0]['name']} ({len(x)} seeds)" if len(x) > 1 else x[0]["name"]: x for x in groups.values()}
