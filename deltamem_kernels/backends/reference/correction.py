"""The correction of a projection's output in plain PyTorch.

A row of base gets the correction u = scale · W r. With head_dim 0:

    out = base + u, or with norm_weight base + RMSNorm(u) · norm_weight

and with a head_dim, for each head of y = base + u:

    out = rotary(RMSNorm(y) · norm_weight), where a step is left out if its weights are None
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...operands import CorrectionOperands
from ...operands.types import accumulation_dtype
from ..base import Gradients, plain_torch


@plain_torch
def correct(operands: CorrectionOperands, out: Tensor | None) -> Tensor:
    """See `Backend.correct`."""
    base, head_dim, norm_eps = operands.base, operands.head_dim, operands.norm_eps
    assert base is not None
    x, u, norm, rotary = _in_arithmetic_dtype(operands)
    assert x is not None
    if not head_dim:
        result = x + (u if norm is None else u * _inverse_rms(u, norm_eps) * norm)
    else:
        y = (x + u).unflatten(-1, (-1, head_dim))
        y = y if norm is None else y * _inverse_rms(y, norm_eps) * norm
        result = (y if rotary is None else y * rotary[0] + _rotate_half(y) * rotary[1]).flatten(-2)
    out = torch.empty(base.shape, dtype=base.dtype, device=base.device) if out is None else out
    return out.copy_(result)


@plain_torch
def correct_backward(operands: CorrectionOperands, d_out: Tensor, needs: list[bool]) -> Gradients:
    """See `Backend.correct_backward`."""
    head_dim, norm_eps = operands.head_dim, operands.norm_eps
    x, u, norm, rotary = _in_arithmetic_dtype(operands, d_out)
    g = d_out.to(u.dtype, copy=True)  # an operator never returns an operand
    d_norm: Tensor | None = None
    if not head_dim:
        if norm is not None:
            g, d_norm = _norm_adjoint(g, u, norm, norm_eps)
    else:
        g = g.unflatten(-1, (-1, head_dim))
        if rotary is not None:
            g = g * rotary[0] - _rotate_half(g * rotary[1])
        if norm is not None:
            g, d_norm = _norm_adjoint(g, (x + u).unflatten(-1, (-1, head_dim)), norm, norm_eps)
        g = g.flatten(-2)
    # One product after another: the order of a matrix product's additions depends on the number of rows.
    d_r = torch.stack([(g * column).sum(-1) for column in operands.weight.to(u.dtype).unbind(1)], -1)
    return gradients(operands, RowGradients(g.to(d_out.dtype), g, d_r, d_norm), needs)


class RowGradients(NamedTuple):
    """What a row's backward leaves for the sums over all rows."""

    base: Tensor
    """The gradient of base, in its dtype."""
    correction: Tensor
    """The gradient of the correction u."""
    reads: Tensor | None
    """The gradient of the reads before the scale, `[..., H·R]`; None where neither reads nor gain need it."""
    norm_weight: Tensor | None
    """The gradient of norm_weight, already summed."""


def gradients(operands: CorrectionOperands, rows: RowGradients, needs: list[bool]) -> Gradients:
    """Return what `Backend.correct_backward` returns."""
    _, reads, weight, gain, norm_weight = operands.differentiable
    assert reads is not None
    assert weight is not None
    g, d_r = rows.correction, rows.reads
    dtype = accumulation_dtype(g, reads, weight, gain, norm_weight)
    factor = operands.scale if gain is None else operands.scale * gain.to(dtype)
    r = _flat(reads, g).to(dtype)
    results = (
        (rows.base if needs[0] else None, rows.base),
        (d_r * factor if needs[1] and d_r is not None else None, reads),
        (torch.einsum("...d,...k->dk", g.to(dtype), r) * factor if needs[2] else None, weight),
        ((d_r * r).sum() * operands.scale if needs[3] and d_r is not None else None, gain),
        (rows.norm_weight if needs[4] else None, norm_weight),
    )
    return [None if d is None or x is None else d.reshape(x.shape).to(x.dtype) for d, x in results]


def _in_arithmetic_dtype(operands: CorrectionOperands, d_out: Tensor | None = None):
    """base and the correction in the dtype of the arithmetic, and the weights of the norm and of the rotary
    embedding."""
    base, gain, norm_weight, cos, sin = operands.base, operands.gain, operands.norm_weight, operands.cos, operands.sin
    dtype = operands.dtype(d_out)
    like = d_out if base is None else base
    assert like is not None
    r, w = _flat(operands.reads, like).to(dtype), operands.weight.to(dtype)
    # One product after another: the order of a matrix product's additions depends on the number of rows.
    u = sum(r[..., j, None] * w[:, j] for j in range(w.shape[1])) * operands.scale
    u = u if gain is None else u * gain.to(dtype)
    rotary = None
    if cos is not None and sin is not None:
        rotary = cos.to(dtype).unsqueeze(-2), sin.to(dtype).unsqueeze(-2)
    norm = None if norm_weight is None else norm_weight.to(dtype)
    return None if base is None else base.to(dtype), u, norm, rotary


def _flat(reads: Tensor, like: Tensor) -> Tensor:
    """Flatten reads to `[B, T, H·R]`, or `[N, H·R]`."""
    return reads if reads.ndim == like.ndim else reads.flatten(-2)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def _norm_adjoint(g: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of weight, from that of RMSNorm(x) · weight."""
    inverse = _inverse_rms(x, eps)
    d_weight = (g * x * inverse).flatten(0, -2).sum(0)
    g = g * weight
    return g * inverse - x * inverse**3 * (g * x).mean(-1, keepdim=True), d_weight


def _rotate_half(x: Tensor) -> Tensor:
    """Map the halves (a, b) of a head to (-b, a). The adjoint of this map is its negative."""
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)
