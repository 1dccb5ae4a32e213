"""How the work is cut into programs, and their launch."""

from __future__ import annotations

import contextlib

import torch
import triton
from torch import Tensor

from ..reference import CHECKPOINT_INTERVAL

LANES = 32
REGISTER_RANK = 16
"""Up to this rank a lane keeps its state row in registers; above it a program shares the state of one head."""


def tiling(H: int, R: int) -> dict[str, int]:
    """Tiles (see _rule.py) and warps of a program. It depends on H and R alone: a sequence has the same bits alone and
    in a batch. A warp takes as many heads of one sequence as it has lanes for; sequences differ in length."""
    rows = triton.next_power_of_2(R)
    if R <= REGISTER_RANK:
        heads = min(triton.next_power_of_2(max(H, 1)), LANES // rows)
        return {"HEADS": heads, "ROWS": rows, "NC": R, "W": 1, "num_warps": 1}
    warps = {32: 4, 64: 16}.get(rows, 32) // (2 if torch.version.hip else 1)  # there a warp has 64 lanes
    return {"HEADS": 1, "ROWS": rows, "NC": 1, "W": rows, "num_warps": warps}


def constants(mode: str, R: int) -> dict:
    return {"MODE": mode, "CHUNK": CHECKPOINT_INTERVAL, "R": R, "num_stages": 1, "enable_fp_fusion": True}


def strides(name: str, x: Tensor | None, dimensions: str) -> dict[str, int]:
    """As a kernel calls them; 1 for those of an absent operand."""
    values = (1,) * len(dimensions) if x is None else x.stride()
    return {f"{name}_s{d}": s for d, s in zip(dimensions, values, strict=True)}


def launch(kernel, programs: int | tuple[int, ...], arguments: dict, like: Tensor) -> None:
    """On the device of `like`; nothing where there are no programs. Every launch of the package goes through here."""
    grid = (programs,) if isinstance(programs, int) else programs
    if all(grid):
        with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
            start(kernel, grid, arguments)


def start(kernel, grid: tuple[int, ...], arguments: dict) -> None:
    kernel[grid](**arguments)
