"""Means over segments of tokens: kernels and launches.

A program sums some columns of one segment, and looks through the ids for its tokens, which may be anywhere. It loads
only the tokens of its own segment, so that together the programs read x once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....operands import SegmentOperands
from ....operands.types import accumulation_dtype
from ..launch import Launch, cdiv, kernel_dtype, run, strides
from ..scan.tiles import store

UNSPECIALIZED = ["p_ids", "p_mask", "p_counts", "T", "M", "ids_sb", "ids_st", "mask_sb", "mask_st"]
"""Arguments whose values and alignment do not matter to the compiler. Those of x do, see projection_kernels.py."""


@triton.jit
def load_ids(p_ids, p_mask, i_b, i_t, T, ids_sb, ids_st, mask_sb, mask_st):
    """Load the ids of tokens i_t of a row, int64. The id is negative for a token that belongs to no segment."""
    m_t = i_t < T
    b_ids = tl.load(p_ids + i_b * ids_sb + i_t * ids_st, mask=m_t, other=-1).to(tl.int64)
    if p_mask is not None:
        b_ids = tl.where(tl.load(p_mask + i_b * mask_sb + i_t * mask_st, mask=m_t, other=0) != 0, b_ids, -1)
    return b_ids


@triton.jit(do_not_specialize=UNSPECIALIZED)
def segment_mean_kernel(
    p_x, p_ids, p_mask, p_means, p_counts, T, D, M, x_sb, x_st, x_sd, ids_sb, ids_st, mask_sb, mask_st,
    DTYPE: tl.constexpr, BLOCK_IDS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    T, D, M = tl.cast(T, tl.int64), tl.cast(D, tl.int64), tl.cast(M, tl.int64)
    i_p = tl.program_id(0).to(tl.int64)
    i_b, i_segment = i_p // M, i_p % M
    i_d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = i_d < D
    p_x += i_b * x_sb
    b_sum = tl.zeros([BLOCK_D], DTYPE)
    count = i_segment * 0
    for i_ids in range(tl.cdiv(T, BLOCK_IDS)):
        first = i_ids * BLOCK_IDS
        i_id = first + tl.arange(0, BLOCK_IDS)
        b_ids = load_ids(p_ids, p_mask, i_b, i_id, T, ids_sb, ids_st, mask_sb, mask_st)
        found = tl.sum((b_ids == i_segment).to(tl.int64), axis=0)
        count += found
        if found > 0:
            for i_block in range(BLOCK_IDS // BLOCK_T):
                i_t = first + i_block * BLOCK_T + tl.arange(0, BLOCK_T)
                own = load_ids(p_ids, p_mask, i_b, i_t, T, ids_sb, ids_st, mask_sb, mask_st) == i_segment
                p_tile = p_x + i_t[:, None] * x_st + i_d[None, :] * x_sd
                b_x = tl.load(p_tile, mask=own[:, None] & m_d[None, :], other=0.0)
                b_sum += tl.sum(b_x.to(DTYPE), axis=0)
    b_mean = b_sum / tl.maximum(count, 1).to(DTYPE)
    store(p_means + i_p * D + i_d, b_mean, m_d)
    tl.store(p_counts + i_p, count.to(tl.int32), mask=tl.program_id(1) == 0)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def segment_mean_backward_kernel(
    p_d_means, p_ids, p_mask, p_counts, p_dx, T, D, M, d_sb, d_sm, d_sd, ids_sb, ids_st, mask_sb, mask_st,
    DTYPE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    T, D, M = tl.cast(T, tl.int64), tl.cast(D, tl.int64), tl.cast(M, tl.int64)
    blocks = tl.cdiv(T, BLOCK_T)
    i_p = tl.program_id(0).to(tl.int64)
    i_b, i_t = i_p // blocks, i_p % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    i_d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = i_d < D
    b_ids = load_ids(p_ids, p_mask, i_b, i_t, T, ids_sb, ids_st, mask_sb, mask_st)
    belongs = (b_ids >= 0) & (b_ids < M)
    b_count = tl.load(p_counts + i_b * M + b_ids, mask=belongs, other=1)
    p_tile = p_d_means + i_b * d_sb + b_ids[:, None] * d_sm + i_d[None, :] * d_sd
    b_d = tl.load(p_tile, mask=belongs[:, None] & m_d[None, :], other=0.0).to(DTYPE)
    b_dx = b_d / b_count.to(DTYPE)[:, None]
    store(p_dx + (i_b * T + i_t[:, None]) * D + i_d[None, :], b_dx, (i_t < T)[:, None] & m_d[None, :])


COLUMNS = 128  # per program


def segment_mean(operands: SegmentOperands) -> tuple[Tensor, Tensor]:
    """See `Backend.segment_mean`."""
    launch, means, counts = mean_launch(operands)
    run([launch], means.device)
    return means, counts


def segment_mean_backward(d_means: Tensor, segment_ids: Tensor, counts: Tensor, mask: Tensor | None) -> Tensor:
    """See `Backend.segment_mean_backward`."""
    launch, d_x = backward_launch(d_means, segment_ids, counts, mask)
    run([launch], d_x.device)
    return d_x


def mean_launch(operands: SegmentOperands) -> tuple[Launch, Tensor, Tensor]:
    """Return the launch, and the means and counts that it fills."""
    x, segment_ids, segments, mask = operands
    B, _, D = x.shape
    means, counts = x.new_empty((B, segments, D)), segment_ids.new_empty((B, segments), dtype=torch.int32)
    arguments = _arguments(x, segment_ids, mask) | {"p_x": x} | strides("x", x, "btd")
    arguments |= {"p_means": means, "p_counts": counts, "M": segments, "BLOCK_IDS": 512, "BLOCK_T": 16}
    return Launch(segment_mean_kernel, (B * segments, max(1, cdiv(D, COLUMNS))), arguments), means, counts


def backward_launch(d_means: Tensor, segment_ids: Tensor, counts: Tensor, mask: Tensor | None) -> tuple[Launch, Tensor]:
    """Return the launch, and the gradient of x that it fills."""
    (B, M, D), T = d_means.shape, segment_ids.shape[1]
    d_x = d_means.new_empty((B, T, D))
    arguments = _arguments(d_means, segment_ids, mask) | {"p_d_means": d_means} | strides("d", d_means, "bmd")
    arguments |= {"p_counts": counts, "M": M, "p_dx": d_x, "BLOCK_T": 32}
    return Launch(segment_mean_backward_kernel, (B * cdiv(T, 32), cdiv(D, COLUMNS)), arguments), d_x


def _arguments(x: Tensor, segment_ids: Tensor, mask: Tensor | None) -> dict[str, Any]:
    arguments = {"p_ids": segment_ids, "p_mask": mask, "T": segment_ids.shape[1], "D": x.shape[2]}
    arguments |= strides("ids", segment_ids, "bt") | strides("mask", mask, "bt")
    return arguments | {"DTYPE": kernel_dtype(accumulation_dtype(x)), "BLOCK_D": COLUMNS, "num_warps": 4}
