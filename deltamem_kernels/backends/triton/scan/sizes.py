"""How the work of a scan is divided: into chunks, groups of chunks and programs.

Tests make chunks short by replacing CHUNK (together with the interval of the checkpoints), GROUP and HISTORY_BYTES.
"""

from __future__ import annotations

import torch

from ....operands import CHECKPOINT_INTERVAL
from ..launch import next_power_of_2

CHUNK = CHECKPOINT_INTERVAL
"""Tokens per chunk."""
GROUP = 128
"""Chunks per group. If a sequence has more than one group, the states within all its groups are computed at once."""
HISTORY_BYTES = 64 << 20
"""The scratch memory of backward, best within the L2 cache. It holds the states of the chunks that programs are working
on, and so limits the number of programs. With more chunks than that, programs take several turns."""
LANES = 32
REGISTER_RANK = 16
"""Up to this rank a lane keeps its state row in registers. Above it, a program shares the state of one head."""


def tiling(H: int, R: int) -> dict[str, int]:
    """Return a program's tiles (see tiles.py) and warps. They depend only on H and R, so that a sequence has the same
    bits alone and in a batch. A warp takes as many heads of one sequence as it has lanes for. It never takes several
    sequences, because their lengths differ."""
    rows = next_power_of_2(R)
    if R <= REGISTER_RANK:
        heads = min(next_power_of_2(max(H, 1)), LANES // rows)
        return {"HEADS": heads, "ROWS": rows, "NC": R, "W": 1, "num_warps": 1}
    warps = {32: 4, 64: 16}.get(rows, 32) // (2 if torch.version.hip else 1)  # a warp has 64 lanes on AMD GPUs
    return {"HEADS": 1, "ROWS": rows, "NC": 1, "W": rows, "num_warps": warps}
