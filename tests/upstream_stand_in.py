"""A stand-in for the δ-mem authors' package `deltamem`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from deltamem_kernels.integrations.upstream import unpatch

NAMES = ("kernels.affine_scan", "core.delta_impl", "core.delta", "runtime.session")


def forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "deltamem"]:
        del sys.modules[name]


@pytest.fixture
def authors(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The modules of the stand-in, which hide an installed `deltamem`."""
    forget()
    monkeypatch.syspath_prepend(Path(__file__).parent / "stand_in")
    yield {name: importlib.import_module(f"deltamem.{name}") for name in NAMES}
    unpatch()
    forget()
