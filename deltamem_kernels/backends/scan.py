"""Whether a scan walks a sequence token after token, or all its chunks side by side: the choice for every backend.

`cpu` and `triton` ask for a call as a whole, `cuda` for a limit that it holds every sequence's own length to.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from .reference import CHECKPOINT_INTERVAL

MAP_RANK = 16
"""Up to this rank a chunk's map pays on a GPU: it is R + 1 scans' work."""
MAP_WORK = 24_000
"""Up to this H R (R + 1) the maps of one sequence leave a GPU time to spare. An estimate on paper."""


class Scan(NamedTuple):
    """How a scan runs, and why."""

    chunked: bool
    reason: str


_ON_CPU = Scan(False, "a chunk's map is R + 1 scans' work, and the threads may have other sequences to run")
_SHORT = Scan(False, f"up to {CHECKPOINT_INTERVAL} tokens are one chunk")
_forced: list[Scan] = []


def choose_scan(backend: str, T: int, H: int, R: int) -> Scan:
    """It looks at the backend and at T, H and R, never at B or at how T is cut into sequences, and no sequence of a
    chunked scan is an exception: each has the same bits alone, packed, and in any batch, also padded behind."""
    if backend != "cpu" and R > MAP_RANK:
        return Scan(False, f"a chunk's map is R + 1 scans' work: too much for R = {R}, over {MAP_RANK}")
    if _forced:
        return _forced[-1]
    if backend == "cpu":
        return _ON_CPU
    if H * R * (R + 1) > MAP_WORK:
        return Scan(False, f"H = {H} heads fill a GPU without the chunks' maps")
    if T <= CHECKPOINT_INTERVAL:  # a chunked scan would give the same bits
        return _SHORT
    return Scan(True, f"T = {T} tokens are more than one chunk of {CHECKPOINT_INTERVAL}")


NEVER = 2**63 - 1


def chunked_from(R: int) -> int:
    """For `cuda`: sequences of at least so many tokens run in chunks. It looks at the rank alone, and the kernels at
    each sequence's length: a sequence has the same bits in any batch."""
    if R > MAP_RANK:
        return NEVER
    if _forced:
        return CHECKPOINT_INTERVAL + 1 if _forced[-1].chunked else NEVER
    return 512 if R <= 8 else 1024  # guessed: three launches and R + 1 times the work, on as many blocks as chunks


@contextlib.contextmanager
def force_scan(chunked: bool) -> Iterator[None]:
    """Runs every scan in one way if it can, for tests and measurements."""
    _forced.append(Scan(chunked, "forced"))
    try:
        yield
    finally:
        _forced.pop()
