"""segment_mean: a program adds up one segment and some columns, and gives the ids a look to find its tokens.

Ids come in any order. A program loads the tokens of its own segment alone: together they read x once, whatever stands
in the others.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import accumulation_dtype
from ._rule import store
from .launch import launch

RUN_VARYING = ["p_ids", "p_mask", "p_counts", "T", "M", "ids_sb", "ids_st", "mask_sb", "mask_st"]
"""Arguments whose values and alignment are no reason to compile a kernel again; those of x are, see projection.py."""


@triton.jit
def ids_of(p_ids, p_mask, i_t, T, ids_st, mask_st):
    """The ids of tokens i_t of a row, int64, and negative for one that belongs to no segment."""
    m_t = i_t < T
    b_ids = tl.load(p_ids + i_t * ids_st, mask=m_t, other=-1).to(tl.int64)
    if p_mask is not None:
        b_ids = tl.where(tl.load(p_mask + i_t * mask_st, mask=m_t, other=0) != 0, b_ids, -1)
    return b_ids


@triton.jit(do_not_specialize=RUN_VARYING)
def segment_mean_kernel(
    p_x, p_ids, p_mask, p_means, p_counts, T, D, M, x_sb, x_st, x_sd, ids_sb, ids_st, mask_sb, mask_st,
    DTYPE: tl.constexpr, BLOCK_IDS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    T, D, M = tl.cast(T, tl.int64), tl.cast(D, tl.int64), tl.cast(M, tl.int64)
    i_p = tl.program_id(0).to(tl.int64)
    i_b, i_segment = i_p // M, i_p % M
    i_d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = i_d < D
    p_ids += i_b * ids_sb
    if p_mask is not None:
        p_mask += i_b * mask_sb
    p_x += i_b * x_sb
    b_sum = tl.zeros([BLOCK_D], DTYPE)
    count = i_segment * 0
    for i_ids in range(tl.cdiv(T, BLOCK_IDS)):
        first = i_ids * BLOCK_IDS
        b_ids = ids_of(p_ids, p_mask, first + tl.arange(0, BLOCK_IDS), T, ids_st, mask_st)
        found = tl.sum((b_ids == i_segment).to(tl.int64), axis=0)
        count += found
        if found > 0:
            for i_block in range(BLOCK_IDS // BLOCK_T):
                i_t = first + i_block * BLOCK_T + tl.arange(0, BLOCK_T)
                own = ids_of(p_ids, p_mask, i_t, T, ids_st, mask_st) == i_segment
                p_tile = p_x + i_t[:, None] * x_st + i_d[None, :] * x_sd
                b_x = tl.load(p_tile, mask=own[:, None] & m_d[None, :], other=0.0)
                b_sum += tl.sum(b_x.to(DTYPE), axis=0)
    b_mean = b_sum / tl.maximum(count, 1).to(DTYPE)
    store(p_means + i_p * D + i_d, b_mean, m_d)
    tl.store(p_counts + i_p, count.to(tl.int32), mask=tl.program_id(1) == 0)


@triton.jit(do_not_specialize=RUN_VARYING)
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
    p_ids += i_b * ids_sb
    if p_mask is not None:
        p_mask += i_b * mask_sb
    b_ids = ids_of(p_ids, p_mask, i_t, T, ids_st, mask_st)
    belongs = (b_ids >= 0) & (b_ids < M)
    b_count = tl.load(p_counts + i_b * M + b_ids, mask=belongs, other=1)
    p_tile = p_d_means + i_b * d_sb + b_ids[:, None] * d_sm + i_d[None, :] * d_sd
    b_d = tl.load(p_tile, mask=belongs[:, None] & m_d[None, :], other=0.0).to(DTYPE)
    b_dx = b_d / b_count.to(DTYPE)[:, None]
    store(p_dx + (i_b * T + i_t[:, None]) * D + i_d[None, :], b_dx, (i_t < T)[:, None] & m_d[None, :])


def _arguments(x: Tensor, segment_ids: Tensor, mask: Tensor | None) -> dict:
    dtype = tl.float64 if accumulation_dtype(x).itemsize == 8 else tl.float32
    s_b, s_t = (0, 0) if mask is None else mask.stride()
    return {
        "p_ids": segment_ids,
        "ids_sb": segment_ids.stride(0),
        "ids_st": segment_ids.stride(1),
        "p_mask": mask,
        "mask_sb": s_b,
        "mask_st": s_t,
        "T": segment_ids.shape[1],
        "D": x.shape[2],
        "DTYPE": dtype,
        "BLOCK_T": 32,
        "num_warps": 4,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }


def forward_arguments(
    x: Tensor, segment_ids: Tensor, num_segments: int, mask: Tensor | None
) -> tuple[tuple[int, int], dict]:
    """Grid and arguments of segment_mean_kernel with its outputs allocated."""
    B, _, D = x.shape
    means, counts = x.new_empty((B, num_segments, D)), segment_ids.new_empty((B, num_segments), dtype=torch.int32)
    arguments = {"p_x": x, "x_sb": x.stride(0), "x_st": x.stride(1), "x_sd": x.stride(2)}
    arguments |= {
        "p_means": means,
        "p_counts": counts,
        "M": num_segments,
        "BLOCK_IDS": 512,
        "BLOCK_T": 16,
        "BLOCK_D": 128,
    }
    return (B * num_segments, max(1, triton.cdiv(D, 128))), _arguments(x, segment_ids, mask) | arguments


def segment_mean_forward(
    x: Tensor, segment_ids: Tensor, num_segments: int, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As in backends/reference_projection.py."""
    grid, arguments = forward_arguments(x, segment_ids, num_segments, mask)
    launch(segment_mean_kernel, grid, arguments, x)
    return arguments["p_means"], arguments["p_counts"]


def backward_arguments(
    d_means: Tensor, segment_ids: Tensor, counts: Tensor, mask: Tensor | None
) -> tuple[tuple[int, int], dict]:
    """Grid and arguments of segment_mean_backward_kernel with its output allocated."""
    (B, M, D), T = d_means.shape, segment_ids.shape[1]
    arguments = {"p_d_means": d_means, "d_sb": d_means.stride(0), "d_sm": d_means.stride(1), "d_sd": d_means.stride(2)}
    arguments |= {"p_counts": counts, "M": M, "p_dx": d_means.new_empty((B, T, D)), "BLOCK_D": 128}
    return (B * triton.cdiv(T, 32), triton.cdiv(D, 128)), _arguments(d_means, segment_ids, mask) | arguments


def segment_mean_backward(d_means: Tensor, segment_ids: Tensor, counts: Tensor, mask: Tensor | None) -> Tensor:
    """As in backends/reference_projection.py."""
    grid, arguments = backward_arguments(d_means, segment_ids, counts, mask)
    launch(segment_mean_backward_kernel, grid, arguments, d_means)
    return arguments["p_dx"]
