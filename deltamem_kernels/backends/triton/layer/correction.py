"""Launches: the correction of a projection's output, forward and backward."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from ....operands import CorrectionOperands
from ...base import Gradients
from ..launch import Launch, cdiv, kernel_dtype, next_power_of_2, run, strides
from .correction_kernels import backward_columns_kernel, backward_rows_kernel, correct_kernel

ROWS, BACKWARD_ROWS = 16, 8
"""Rows of a tile, as many as fit in registers. Few rows get the same tiles, because a row has to be summed in the same
order in every batch."""
COLUMNS = 128
"""Columns of a unit without heads."""
GROUPS, GROUP_ROWS = 64, 64
"""The largest number of groups of rows, and the number of rows from which on there is another group."""


def correct(operands: CorrectionOperands, out: Tensor | None) -> Tensor:
    """See `Backend.correct`."""
    base = operands.base
    assert base is not None
    if out is None:
        out = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    if base.numel():
        run([correct_launch(operands, out)], base.device)
    return out


def correct_backward(operands: CorrectionOperands, d_out: Tensor, needs: list[bool]) -> Gradients:
    """See `Backend.correct_backward`. There are at most two launches, followed by the sums over groups of rows."""
    _, reads, weight, gain, norm_weight = operands.differentiable
    if not d_out.numel():
        given = (d_out, reads, weight, gain, norm_weight)
        return [torch.zeros_like(x) if need and x is not None else None for x, need in zip(given, needs, strict=True)]
    by_rows, by_columns = backward_launches(operands, d_out, needs)
    needs_base, needs_reads, needs_weight, needs_gain, needs_norm = needs
    runs_rows = needs_base or needs_reads or needs_gain or by_rows.arguments["p_stats"] is not None
    runs_columns = needs_weight or needs_norm
    run([by_rows] * runs_rows + [by_columns] * runs_columns, d_out.device)
    d_base, d_reads, d_gain = (by_rows.arguments[f"p_d_{name}"] for name in ("base", "reads", "gain"))
    d_weight = by_columns.arguments["p_d_weight"].sum(0).to(operands.weight.dtype) if needs_weight else None
    if needs_gain and gain is not None:
        d_gain = (d_gain.sum() * operands.scale).to(gain.dtype)
    d_norm = None
    if needs_norm and norm_weight is not None:
        d_norm = by_columns.arguments["p_d_norm"].view(-1, norm_weight.shape[0]).sum(0).to(norm_weight.dtype)
    return [d_base, d_reads, d_weight, d_gain, d_norm]


def correct_launch(operands: CorrectionOperands, out: Tensor) -> Launch:
    """Return the launch that corrects base into `out`."""
    arguments = _arguments(operands, out) | {"p_out": out, "ROWS": ROWS} | _row_strides("out", out)
    programs = cdiv(arguments["rows"], ROWS)
    if not _norm_over_correction(operands):
        programs *= cdiv(arguments["D"], arguments["UNIT"])
    return Launch(correct_kernel, (programs,), arguments)


def backward_launches(operands: CorrectionOperands, d_out: Tensor, needs: list[bool]) -> tuple[Launch, Launch]:
    """Return the launches of backward_rows_kernel and of backward_columns_kernel, with allocated results."""
    shared = _arguments(operands, d_out) | {"p_d_out": d_out, "ROWS": BACKWARD_ROWS} | _row_strides("d_out", d_out)
    rows, D, K, reads = shared["rows"], shared["D"], shared["K"], operands.reads
    dtype = operands.dtype(d_out)
    stats = d_out.new_empty((rows, 2), dtype=dtype) if _norm_over_correction(operands) else None
    shared |= {"KP": next_power_of_2(K), "p_stats": stats}
    needs_base, needs_reads, _, needs_gain, _ = needs
    by_rows = {
        "p_d_base": d_out.new_empty(d_out.shape) if needs_base else None,
        "p_d_reads": reads.new_empty(reads.shape) if needs_reads else None,
        "p_d_gain": d_out.new_empty((rows,), dtype=dtype) if needs_gain else None,
    }
    groups = max(1, min(GROUPS, cdiv(rows, GROUP_ROWS)))
    by_columns = {
        "p_d_weight": d_out.new_empty((groups, D, K), dtype=dtype),
        "p_d_norm": d_out.new_empty((groups, D), dtype=dtype) if operands.norm_weight is not None else None,
        "blocks": cdiv(cdiv(rows, groups), BACKWARD_ROWS),
        "num_warps": 4 if operands.head_dim else 8,  # with these numbers nothing spills
    }
    units = cdiv(D, shared["UNIT"])
    return (
        Launch(backward_rows_kernel, (cdiv(rows, BACKWARD_ROWS),), shared | by_rows),
        Launch(backward_columns_kernel, (groups * units,), shared | by_columns),
    )


def _norm_over_correction(operands: CorrectionOperands) -> bool:
    return operands.norm_weight is not None and not operands.head_dim


def _arguments(operands: CorrectionOperands, like: Tensor) -> dict[str, Any]:
    """Return the arguments of all kernels. `like` has base's shape."""
    reads, weight, head_dim = operands.reads, operands.weight, operands.head_dim
    *leading, D = like.shape
    unit = head_dim or min(COLUMNS, next_power_of_2(D))
    scale = ctypes.c_float(operands.scale).value  # Triton passes a float as float32
    arguments: dict[str, Any] = {
        "p_base": operands.base,
        "p_reads": reads,
        "p_weight": weight,
        "p_gain": operands.gain,
        "p_norm": operands.norm_weight,
        "rows": math.prod(leading),
        "T": leading[1] if len(leading) == 2 else 1,
        "scale": scale,
        "scale_rest": operands.scale - scale if math.isfinite(scale) else 0.0,
        "EPS": operands.norm_eps,
        "DTYPE": kernel_dtype(operands.dtype(like)),
        "D": D,
        "R": reads.shape[-1],
        "K": weight.shape[1],
        "HEADS": head_dim > 0,
        "UNIT": unit,
        "HALF": next_power_of_2((unit + 1) // 2),
        "num_warps": 4,
    }
    dimensions = "bt"[: len(leading)] + ("hr" if reads.ndim > like.ndim else "r")
    arguments |= strides("reads", reads, "bthr", dimensions)
    arguments |= strides("weight", weight, "dk") | strides("norm", operands.norm_weight, "d")
    arguments |= _row_strides("base", operands.base)
    for name, table in (("cos", operands.cos), ("sin", operands.sin)):
        table = None if table is None else table.expand(*leading, head_dim)  # its first dimension may be 1
        arguments |= {f"p_{name}": table} | _row_strides(name, table)
    return arguments


def _row_strides(name: str, x: Tensor | None) -> dict[str, int]:
    return strides(name, x, "btd", "bd" if x is not None and x.ndim == 2 else "btd")
