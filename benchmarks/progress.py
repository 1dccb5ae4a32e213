"""Progress in the terminal: a bar if rich is installed, else one line for each step."""

from __future__ import annotations

import sys
from types import TracebackType


class Progress:
    def __init__(self, total: float) -> None:
        self._bar = None
        try:
            from rich import progress
            from rich.console import Console
        except ImportError:
            return
        columns = (progress.BarColumn(), progress.TimeElapsedColumn(), progress.TextColumn("{task.description}"))
        self._bar = progress.Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def describe(self, text: str) -> None:
        if self._bar:
            self._bar.update(self._task, description=text)
        else:
            print(text, file=sys.stderr, flush=True)

    def advance(self, amount: float) -> None:
        if self._bar:
            self._bar.advance(self._task, amount)
