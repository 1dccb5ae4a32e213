"""The fast path of eager calls on CPU tensors: one C++ function per operation, from the public function to the kernel.

A C++ function has three answers. The results (True from `step`), where the call is plain: nothing but a kernel on CPU
tensors has to run. False, where the operands fit, but a gradient is wanted or another backend is chosen: the caller
calls the registered operator. None in all other cases: the caller first checks the operands in Python, which raises the
errors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

FUNCTIONS = ("scan", "step", "correct", "project", "prefill", "decode", "layer_step")


def _decline(*arguments: object) -> None:
    """The answer of every function before the CPU library is loaded."""


class EagerCalls:
    """The C++ functions. Each takes an operand record, the results to write into where there are some, and the name of
    the backend or None."""

    scan: Callable[..., Any]
    step: Callable[..., Any]
    correct: Callable[..., Any]
    project: Callable[..., Any]
    prefill: Callable[..., Any]
    decode: Callable[..., Any]
    layer_step: Callable[..., Any]

    def __init__(self) -> None:
        self._library: ModuleType | None = None
        self._disabled = 0
        self._choose_functions()

    def enable(self, library: ModuleType) -> None:
        """Use the functions of the CPU library from now on, or after the outermost `disabled`."""
        self._library = library
        self._choose_functions()

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Send every call through the checks in Python and the registered operators, for tests and measurements."""
        self._disabled += 1
        self._choose_functions()
        try:
            yield
        finally:
            self._disabled -= 1
            self._choose_functions()

    def _choose_functions(self) -> None:
        library = None if self._disabled else self._library
        for name in FUNCTIONS:
            setattr(self, name, _decline if library is None else getattr(library, f"eager_{name}"))


eager = EagerCalls()
