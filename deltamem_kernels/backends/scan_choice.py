"""The choice between the two ways to run a scan: serially over the tokens, or over all chunks in parallel.

`cpu` and `triton` choose for a call as a whole. `cuda` compares every sequence's own length with a limit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from ..operands import CHECKPOINT_INTERVAL
from .eager import eager

MAP_RANK = 16
"""Up to this rank chunks pay on a GPU. The map of a chunk costs as much as R + 1 scans."""
MAP_WORK = 24_000
"""Up to this H·R·(R + 1) the maps of one sequence do not fill a GPU. An estimate that was not measured."""


class Scan(NamedTuple):
    """How a scan runs, and the reason."""

    chunked: bool
    reason: str


_ON_CPU = Scan(
    False, "the map of a chunk costs as much as R + 1 scans, and the threads may have other sequences to run"
)
_SHORT = Scan(False, f"up to {CHECKPOINT_INTERVAL} tokens are one chunk")
_forced: list[Scan] = []


def choose_scan(backend: str, T: int, H: int, R: int) -> Scan:
    """Choose from the backend and T, H and R. B and the lengths of packed sequences do not matter, and within a chunked
    scan every sequence runs in chunks: a sequence has the same bits alone, packed, in any batch, and with trailing
    padding."""
    if backend != "cpu" and R > MAP_RANK:
        return Scan(False, f"the map of a chunk costs as much as R + 1 scans: too much for R = {R}, over {MAP_RANK}")
    if _forced:
        return _forced[-1]
    if backend == "cpu":
        return _ON_CPU
    if H * R * (R + 1) > MAP_WORK:
        return Scan(False, f"H = {H} heads fill a GPU without the chunks' maps")
    if T <= CHECKPOINT_INTERVAL:  # in chunks the bits would be the same
        return _SHORT
    return Scan(True, f"T = {T} tokens are more than one chunk of {CHECKPOINT_INTERVAL}")


NEVER = 2**63 - 1


def chunked_from(R: int) -> int:
    """Return the number of tokens from which on `cuda` runs a sequence in chunks. It depends on the rank alone, and the
    kernels compare it with each sequence's length: a sequence has the same bits in any batch."""
    if R > MAP_RANK:
        return NEVER
    if _forced:
        return CHECKPOINT_INTERVAL + 1 if _forced[-1].chunked else NEVER
    return 512 if R <= 8 else 1024  # not measured: three launches and R + 1 times the work, on as many blocks as chunks


@contextlib.contextmanager
def force_scan(chunked: bool) -> Iterator[None]:
    """Run every scan in one way, where it can, for tests and measurements."""
    _forced.append(Scan(chunked, "forced"))
    try:
        with eager.disabled():  # the fast path does not ask here
            yield
    finally:
        _forced.pop()
