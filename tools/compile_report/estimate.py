"""The time that the inner loops imply for a forward scan, computed and not measured."""

from __future__ import annotations

from typing import NamedTuple

from deltamem_kernels.operands import CHECKPOINT_INTERVAL

from .compiler import Row

CLOCK_GHZ, BYTES_PER_SECOND, SCHEDULERS, LATENCY = 1.98, 4.3e12, 4 * 132, 4
"""An H200's highest clock, its measured copy bandwidth, the number of warps that can start an instruction in one cycle,
and the cycles from one fused multiply-add to another that waits for it."""


class Estimate(NamedTuple):
    """For one sequence of one head in 16 bits; times are microseconds without launches."""

    rank: int
    tokens: int
    chain: int
    """Cycles of a token's dependent operations: a dot product, the change that it makes, the state after it."""
    instructions: int
    """Instructions of one warp per token. A warp starts at most one per cycle."""
    plain: float
    chunked: float
    byte_floor: float


def estimate(rows: list[Row], tokens: int = 8192) -> list[Estimate]:
    """Estimate the forward scan from the rows of one arch. A warp needs the larger of the chain and its instructions.
    With more warps than schedulers, they take turns."""
    from deltamem_kernels.backends.triton.scan.sizes import GROUP, LANES, tiling

    loops = {(row.kernel, row.rank): row.loops[0] for row in rows if row.loops}
    estimates = []
    for rank in sorted({row.rank for row in rows if row.kernel == "forward"}):
        chain = (rank + 2) * LATENCY
        token, virtual, fold = (loops[x, rank] for x in ("forward", "maps", "fold"))
        chunks = tokens // CHECKPOINT_INTERVAL
        warps_of_maps = chunks * -(-(rank + 1) // tiling(rank + 1, rank)["HEADS"])
        maps: float = max(chain, virtual, virtual * warps_of_maps / SCHEDULERS)
        folds: float = min(chunks, 2 * GROUP + chunks // GROUP) * fold
        # With more than one group, each virtual row goes through all maps once more.
        warps_of_fold = (rank + 1) * rank * rank / LANES
        folds = max(folds, (chunks > GROUP) * chunks * fold * warps_of_fold / SCHEDULERS)
        plain = tokens * max(chain, token)
        chunked = CHECKPOINT_INTERVAL * (maps + max(chain, token, token * chunks / SCHEDULERS)) + folds
        floor = tokens * 5 * rank * 2 / BYTES_PER_SECOND
        cycles = CLOCK_GHZ * 1e3  # per microsecond
        estimates.append(Estimate(rank, tokens, chain, token, plain / cycles, chunked / cycles, floor * 1e6))
    return estimates
