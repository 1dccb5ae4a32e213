"""Which MemoryCall is open: a context variable, and a copy of it that `torch.compile` can read.

Code of the same thread and `asyncio` task sees a call, and code that got a copy of their context. `torch.compile`
does not trace context variables. Compiled code therefore reads a record of its thread instead, as long as only this
thread, and no task, has calls open. Otherwise it reads the context variable, which breaks the graph.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .call import MemoryCall

_innermost: contextvars.ContextVar[MemoryCall | None] = contextvars.ContextVar("innermost", default=None)


class _Thread(threading.local):
    """What one thread has open."""

    def __init__(self) -> None:
        self.marker = object()
        self.innermost: MemoryCall | None = None


class _Everywhere:
    """Who has calls open in the process: nobody (None), the thread of a marker, or `SEVERAL`."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.owners: dict[int, object] = {}
        self.owner: object | None = None

    def update(self) -> None:
        owners = set(self.owners.values())
        self.owner = owners.pop() if len(owners) == 1 else SEVERAL if owners else None


SEVERAL = object()
_thread = _Thread()
_everywhere = _Everywhere()


def innermost() -> MemoryCall | None:
    """Return the MemoryCall that was opened last in this context and is not closed, of whichever model."""
    if not torch.compiler.is_compiling():
        return _innermost.get()
    if _everywhere.owner is None:
        return None
    return _thread.innermost if _everywhere.owner is _thread.marker else _innermost.get()


def enter(call: MemoryCall) -> None:
    """Make a MemoryCall the innermost one."""
    _innermost.set(call)
    _thread.innermost = call
    with _everywhere.lock:
        _everywhere.owners[call.number] = SEVERAL if _in_task() else _thread.marker
        _everywhere.update()


def leave(call: MemoryCall, innermost: MemoryCall | None) -> None:
    """End a MemoryCall. `innermost` is the one that is then innermost."""
    _innermost.set(innermost)
    _thread.innermost = innermost
    with _everywhere.lock:
        _everywhere.owners.pop(call.number, None)
        _everywhere.update()


def _in_task() -> bool:
    try:
        return asyncio.current_task() is not None
    except RuntimeError:  # no event loop runs
        return False
