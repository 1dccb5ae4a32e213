"""The correction of a layer's projections in plain PyTorch; `reference` offers it with the rest.

A row of base gets the correction u = scale · W r. Then, with head_dim 0:

    out = base + u, or with norm_weight base + RMSNorm(u) · norm_weight

and with a head_dim, for each head of y = base + u on its own:

    out = rotary(RMSNorm(y) · norm_weight), either left out where its weights are None
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arithmetic import accumulation_dtype, as_kernel


@as_kernel
def correct(
    base: Tensor,
    reads: Tensor,
    weight: Tensor,
    gain: Tensor | None,
    norm_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float,
    norm_eps: float,
    head_dim: int,
    out: Tensor | None,
) -> Tensor:
    """Into out, which may be base itself, or into a new contiguous tensor like base. base `[B, T, D]` or `[N, D]`;
    reads `[..., H, R]` or `[..., R]`; weight `[D, H·R]`; gain, a number on the device, multiplies scale."""
    x, u, norm, rotary = _operands(base, reads, weight, gain, norm_weight, cos, sin, scale, head_dim)
    if not head_dim:
        result = x + (u if norm is None else u * _inverse_rms(u, norm_eps) * norm)
    else:
        y = (x + u).unflatten(-1, (-1, head_dim))
        y = y if norm is None else y * _inverse_rms(y, norm_eps) * norm
        result = (y if rotary is None else y * rotary[0] + _rotate_half(y) * rotary[1]).flatten(-2)
    out = torch.empty(base.shape, dtype=base.dtype, device=base.device) if out is None else out
    return out.copy_(result)


@as_kernel
def correct_backward(
    d_out: Tensor,
    base: Tensor | None,
    reads: Tensor,
    weight: Tensor,
    gain: Tensor | None,
    norm_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float,
    norm_eps: float,
    head_dim: int,
    needs: list[bool],
) -> list[Tensor | None]:
    """Gradients of base, reads, weight, gain and norm_weight, in their shapes and dtypes; None where `needs` says that
    nobody asks. base is None where it does not matter: without a head_dim, and without a norm. Without a head_dim its
    gradient is d_out, and not computed here."""
    x, u, norm, rotary = _operands(base, reads, weight, gain, norm_weight, cos, sin, scale, head_dim, d_out)
    g = d_out.to(u.dtype, copy=True)  # what an operator returns is never an operand
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
    # One product after another, as above.
    d_r = torch.stack([(g * column).sum(-1) for column in weight.to(u.dtype).unbind(1)], -1)
    return gradients(g.to(d_out.dtype), g, d_r, d_norm, reads, weight, gain, norm_weight, scale, needs)


def gradients(
    d_base: Tensor,
    g: Tensor,
    d_r: Tensor | None,
    d_norm: Tensor | None,
    reads: Tensor,
    weight: Tensor,
    gain: Tensor | None,
    norm_weight: Tensor | None,
    scale: float,
    needs: list[bool],
) -> list[Tensor | None]:
    """What correct_backward returns, from g, the gradient of what the norm is over, and d_r, that of the reads before
    the scale, `[..., H·R]`; d_base is g in base's dtype. d_r may be None where neither reads nor gain need it."""
    dtype = accumulation_dtype(g, reads, weight, gain, norm_weight)
    factor = scale if gain is None else scale * gain.to(dtype)
    r = _flat(reads, g).to(dtype)
    results = (
        (d_base if needs[0] else None, d_base),
        (d_r * factor if needs[1] and d_r is not None else None, reads),
        (torch.einsum("...d,...k->dk", g.to(dtype), r) * factor if needs[2] else None, weight),
        ((d_r * r).sum() * scale if needs[3] and d_r is not None else None, gain),
        (d_norm if needs[4] else None, norm_weight),
    )
    return [None if d is None or x is None else d.reshape(x.shape).to(x.dtype) for d, x in results]


def _operands(base, reads, weight, gain, norm_weight, cos, sin, scale, head_dim, like=None):
    """base and the correction in the dtype of the arithmetic, and the weights of the norm and of the rotary."""
    dtype = accumulation_dtype(base, reads, weight, gain, norm_weight, cos, sin, like)
    r, w = _flat(reads, like if base is None else base).to(dtype), weight.to(dtype)
    # One product after another: what a matrix product adds up in which order depends on how many rows there are.
    u = sum(r[..., j, None] * w[:, j] for j in range(w.shape[1])) * scale
    u = u if gain is None else u * gain.to(dtype)
    rotary = None if cos is None else (cos.to(dtype).unsqueeze(-2), sin.to(dtype).unsqueeze(-2))
    return (
        None if base is None else base.to(dtype),
        u,
        None if norm_weight is None else norm_weight.to(dtype),
        rotary,
    )


def _flat(reads: Tensor, like: Tensor) -> Tensor:
    """`[B, T, H·R]`, or `[N, H·R]`."""
    return reads if reads.ndim == like.ndim else reads.flatten(-2)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def _norm_adjoint(g: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """From the gradient of RMSNorm(x) · weight to those of x and of weight."""
    inverse = _inverse_rms(x, eps)
    d_weight = (g * x * inverse).flatten(0, -2).sum(0)
    g = g * weight
    return g * inverse - x * inverse**3 * (g * x).mean(-1, keepdim=True), d_weight


def _rotate_half(x: Tensor) -> Tensor:
    """(a, b) to (-b, a): the halves of a head are the two coordinates of its planes. Its adjoint is its negative."""
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)
