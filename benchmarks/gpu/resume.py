"""A pytest plugin: `-p benchmarks.gpu.resume --outcomes FILE` writes each test's outcome to FILE as it comes, and
leaves out the tests that have passed there. A suite that is stopped in the middle goes on from there."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch

DONE = pytest.StashKey[set[str]]()
FAULT = 70
MESSAGE_CHARACTERS = 600


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", required=True)  # a word: pytest-xdist sends it to its workers


def read(path: Path) -> dict[str, dict]:
    """The latest outcome of each test. A line that was cut off in the middle is none."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[entry["test"]] = entry
    return found


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:
    """pytest-xdist's workers leave out what the controller does, also one that starts in the middle: all have to
    collect the same tests."""
    node.workerinput["done"] = sorted(node.config.stash[DONE])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    done = config.stash[DONE]
    left_out = [item for item in items if _plain(item.nodeid) in done]
    items[:] = [item for item in items if _plain(item.nodeid) not in done]
    config.hook.pytest_deselected(items=left_out)


def _plain(name: str) -> str:
    """Without the group that pytest-xdist adds."""
    return name.split("@")[0]


class Writer:
    def __init__(self, path: Path) -> None:
        self._file = path.open("a", buffering=1)
        self._file.write("\n")  # ends a line that was being written when the suite was stopped
        self._seconds: Counter[str] = Counter()
        self._told: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Setup, call and teardown report one by one: one that fails or skips tells, else the last."""
        name = _plain(report.nodeid)
        self._seconds[name] += report.duration
        if report.passed and (report.when != "teardown" or name in self._told):
            return
        self._told.add(name)
        why = "" if report.passed else str(report.longrepr)[-MESSAGE_CHARACTERS:]
        entry = {"test": name, "outcome": report.outcome, "seconds": round(self._seconds[name], 3), "why": why}
        self._file.write(json.dumps(entry) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        config.stash[DONE] = set(config.workerinput["done"])
        return
    path = Path(config.getoption("--outcomes"))  # with pytest-xdist the controller alone reads and writes it
    config.stash[DONE] = {name for name, entry in read(path).items() if entry["outcome"] != "failed"}
    config.pluginmanager.register(Writer(path), "outcomes-writer")


def pytest_runtest_logfinish() -> None:
    """A fault of a kernel spoils CUDA for the rest of the process, and with it every later test there. pytest-xdist
    calls the test during which a worker ends failed, and starts another worker for the rest."""
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(FAULT)


def summary(path: Path) -> list[dict]:
    """A row for each test file with its counts, and one for each test that failed or was skipped."""
    files: dict[str, Counter] = defaultdict(Counter)
    rows = []
    for name, entry in read(path).items():
        counts = files[name.split("::")[0]]
        counts[entry["outcome"]] += 1
        counts["seconds"] += entry["seconds"]
        if entry["outcome"] != "passed":
            rows.append(entry)
    sums = [
        {
            "file": file,
            **{x: counts[x] for x in ("passed", "failed", "skipped")},
            "seconds": round(counts["seconds"], 1),
        }
        for file, counts in sorted(files.items())
    ]
    return sums + rows
