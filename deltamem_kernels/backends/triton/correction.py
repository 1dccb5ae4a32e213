"""The correction in Triton, forward and backward: kernels and their launches. No atomics: what is summed over rows is
summed by groups of rows, which depend on their number alone, and the groups in order.
"""

from __future__ import annotations

import ctypes
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import accumulation_dtype
from ._correction import (
    RUN_VARYING,
    correction,
    inverse_rms,
    load_factor,
    load_pair,
    load_vectors,
    norm_adjoint,
    normed,
    rotated,
    rotated_back,
    row_indices,
    store_pair,
    store_tile,
    sum_of_products,
    unit_columns,
)
from .launch import launch

ROWS, BACKWARD_ROWS = 16, 8
"""Of a tile: what fits in registers. Not fewer for few rows: a row would be summed up in another order."""
COLUMNS = 128
"""Of a unit without heads."""
GROUPS, GROUP_ROWS = 64, 64


@triton.jit(do_not_specialize=RUN_VARYING)
def correct_kernel(
    p_out, p_base, p_reads, p_weight, p_gain, p_norm, p_cos, p_sin, rows, T, scale, scale_rest,
    base_sb, base_st, base_sd, reads_sb, reads_st, reads_sh, reads_sr, out_sb, out_st, out_sd, weight_sd, weight_sk,
    norm_sd, cos_sb, cos_st, cos_sd, sin_sb, sin_st, sin_sd,
    EPS: tl.constexpr, DTYPE: tl.constexpr, D: tl.constexpr, R: tl.constexpr, K: tl.constexpr, HEADS: tl.constexpr,
    UNIT: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A tile; with a norm over the correction all tiles of some rows, twice."""
    UNITS: tl.constexpr = (D + UNIT - 1) // UNIT
    WHOLE: tl.constexpr = p_norm is not None and not HEADS
    i_p = tl.program_id(0).to(tl.int64)
    i_first = i_p * 0
    if WHOLE:
        i_block = i_p
    else:
        i_block, i_first = i_p // UNITS, i_p % UNITS
    _i_row, i_b, i_t, m_row = row_indices(i_block, rows, T, ROWS)
    factor = load_factor(p_gain, scale, scale_rest, DTYPE)
    p_reads += i_b * reads_sb + i_t * reads_st
    p_base += i_b * base_sb + i_t * base_st
    p_out += i_b * out_sb + i_t * out_st

    b_inverse = tl.zeros((ROWS,), DTYPE)
    if WHOLE:
        for i_unit in range(UNITS):
            i_d, _i_u, m_d = unit_columns(i_unit, D, UNIT, HALF)
            b_u = correction(p_reads, reads_sh, reads_sr, p_weight, weight_sd, weight_sk, i_d, m_row, m_d, factor,
                             R, K, ROWS, HALF, DTYPE)  # fmt: skip
            b_inverse += sum_of_products(b_u, b_u)
        b_inverse = inverse_rms(b_inverse, EPS, D)
    for i in range(UNITS if WHOLE else 1):
        i_d, i_u, m_d = unit_columns(i_first + i, D, UNIT, HALF)
        b_u = correction(p_reads, reads_sh, reads_sr, p_weight, weight_sd, weight_sk, i_d, m_row, m_d, factor,
                         R, K, ROWS, HALF, DTYPE)  # fmt: skip
        if WHOLE:
            b_u = normed(b_u, load_vectors(p_norm, i_d, norm_sd, m_d, DTYPE), b_inverse)
        b_x = load_pair(p_base, i_d, base_sd, m_row, m_d, DTYPE)
        b_x = (b_x[0] + b_u[0], b_x[1] + b_u[1])
        if HEADS and p_norm is not None:
            b_w = load_vectors(p_norm, i_u, norm_sd, m_d, DTYPE)
            b_x = normed(b_x, b_w, inverse_rms(sum_of_products(b_x, b_x), EPS, UNIT))
        if p_cos is not None:
            b_cos = load_pair(p_cos + i_b * cos_sb + i_t * cos_st, i_u, cos_sd, m_row, m_d, DTYPE)
            b_sin = load_pair(p_sin + i_b * sin_sb + i_t * sin_st, i_u, sin_sd, m_row, m_d, DTYPE)
            b_x = rotated(b_x, b_cos, b_sin)
        store_pair(p_out, i_d, out_sd, m_row, m_d, b_x)


@triton.jit
def unit_adjoint(
    p_d_out, p_base, p_reads, p_weight, p_norm, p_cos, p_sin, base_sd, reads_sh, reads_sr, d_out_sd, weight_sd,
    weight_sk, norm_sd, cos_sd, sin_sd, i_unit, m_row, factor, b_inverse, b_along, EPS: tl.constexpr,
    DTYPE: tl.constexpr, D: tl.constexpr, R: tl.constexpr, K: tl.constexpr, HEADS: tl.constexpr, UNIT: tl.constexpr,
    HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The tile of the correction's gradient, and what each row adds to that of the norm's weight."""
    i_d, i_u, m_d = unit_columns(i_unit, D, UNIT, HALF)
    b_g = load_pair(p_d_out, i_d, d_out_sd, m_row, m_d, DTYPE)
    if p_cos is not None:
        b_cos = load_pair(p_cos, i_u, cos_sd, m_row, m_d, DTYPE)
        b_sin = load_pair(p_sin, i_u, sin_sd, m_row, m_d, DTYPE)
        b_g = rotated_back(b_g, b_cos, b_sin)
    b_d_norm = b_g
    if p_norm is not None:
        b_x = correction(p_reads, reads_sh, reads_sr, p_weight, weight_sd, weight_sk, i_d, m_row, m_d, factor,
                         R, K, ROWS, HALF, DTYPE)  # fmt: skip
        if HEADS:
            b_w = load_vectors(p_norm, i_u, norm_sd, m_d, DTYPE)
            b_base = load_pair(p_base, i_d, base_sd, m_row, m_d, DTYPE)
            b_x = (b_x[0] + b_base[0], b_x[1] + b_base[1])
            b_inverse = inverse_rms(sum_of_products(b_x, b_x), EPS, UNIT)
            b_gw = (b_g[0] * b_w[0], b_g[1] * b_w[1])
            b_along = sum_of_products(b_gw, b_x) / UNIT * b_inverse * b_inverse * b_inverse
        else:
            b_w = load_vectors(p_norm, i_d, norm_sd, m_d, DTYPE)
        b_d_norm = (b_g[0] * b_x[0] * b_inverse[:, None], b_g[1] * b_x[1] * b_inverse[:, None])
        b_g = norm_adjoint(b_g, b_x, b_w, b_inverse, b_along)
    return b_g, b_d_norm


@triton.jit(do_not_specialize=RUN_VARYING)
def backward_rows_kernel(
    p_d_base, p_d_reads, p_d_gain, p_stats, p_d_out, p_base, p_reads, p_weight, p_gain, p_norm, p_cos, p_sin, rows, T,
    scale, scale_rest, base_sb, base_st, base_sd, reads_sb, reads_st, reads_sh, reads_sr, d_out_sb, d_out_st, d_out_sd,
    weight_sd, weight_sk, norm_sd, cos_sb, cos_st, cos_sd, sin_sb, sin_st, sin_sd,
    EPS: tl.constexpr, DTYPE: tl.constexpr, D: tl.constexpr, R: tl.constexpr, K: tl.constexpr, HEADS: tl.constexpr,
    UNIT: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """What each row has of its own: the gradients of base and reads, its share of the scale's, and for the other
    kernel, with a norm over the correction, 1 / rms and the gradient along the correction."""
    UNITS: tl.constexpr = (D + UNIT - 1) // UNIT
    i_row, i_b, i_t, m_row = row_indices(tl.program_id(0).to(tl.int64), rows, T, ROWS)
    factor = load_factor(p_gain, scale, scale_rest, DTYPE)
    p_reads += i_b * reads_sb + i_t * reads_st
    p_d_out += i_b * d_out_sb + i_t * d_out_st
    if p_base is not None:
        p_base += i_b * base_sb + i_t * base_st
    if p_cos is not None:
        p_cos += i_b * cos_sb + i_t * cos_st
        p_sin += i_b * sin_sb + i_t * sin_st

    b_inverse = tl.zeros((ROWS,), DTYPE)
    b_along = tl.zeros((ROWS,), DTYPE)
    if p_stats is not None:
        for i_unit in range(UNITS):
            i_d, _i_u, m_d = unit_columns(i_unit, D, UNIT, HALF)
            b_u = correction(p_reads, reads_sh, reads_sr, p_weight, weight_sd, weight_sk, i_d, m_row, m_d, factor,
                             R, K, ROWS, HALF, DTYPE)  # fmt: skip
            b_g = load_pair(p_d_out, i_d, d_out_sd, m_row, m_d, DTYPE)
            b_w = load_vectors(p_norm, i_d, norm_sd, m_d, DTYPE)
            b_inverse += sum_of_products(b_u, b_u)
            b_along += sum_of_products((b_g[0] * b_w[0], b_g[1] * b_w[1]), b_u)
        b_inverse = inverse_rms(b_inverse, EPS, D)
        b_along = b_along / D * b_inverse * b_inverse * b_inverse
        tl.store(p_stats + i_row * 2, b_inverse, mask=m_row)
        tl.store(p_stats + i_row * 2 + 1, b_along, mask=m_row)

    i_k = tl.arange(0, KP).to(tl.int64)
    b_d = tl.zeros((ROWS, KP), DTYPE)
    for i_unit in range(UNITS):
        b_g, _b_n = unit_adjoint(
            p_d_out, p_base, p_reads, p_weight, p_norm, p_cos, p_sin, base_sd, reads_sh, reads_sr, d_out_sd, weight_sd,
            weight_sk, norm_sd, cos_sd, sin_sd, i_unit, m_row, factor, b_inverse, b_along, EPS, DTYPE, D, R, K, HEADS,
            UNIT, HALF, ROWS,
        )  # fmt: skip
        i_d, _i_u, m_d = unit_columns(i_unit, D, UNIT, HALF)
        if p_d_base is not None:
            store_pair(p_d_base + i_row * D, i_d, 1, m_row, m_d, b_g)
        for j in range(K):
            b_w = load_vectors(p_weight + j * weight_sk, i_d, weight_sd, m_d, DTYPE)
            b_d += tl.where(i_k[None, :] == j, sum_of_products(b_g, b_w)[:, None], 0.0)
    m_k = m_row[:, None] & (i_k < K)[None, :]
    if p_d_gain is not None:
        b_r = tl.load(p_reads[:, None] + ((i_k // R) * reads_sh + (i_k % R) * reads_sr)[None, :], mask=m_k, other=0.0)
        tl.store(p_d_gain + i_row, tl.sum(b_d * b_r.to(DTYPE), axis=1), mask=m_row)
    if p_d_reads is not None:
        store_tile(p_d_reads + (i_row * K)[:, None] + i_k[None, :], b_d * factor, m_k)


@triton.jit(do_not_specialize=RUN_VARYING)
def backward_columns_kernel(
    p_d_weight, p_d_norm, p_stats, p_d_out, p_base, p_reads, p_weight, p_gain, p_norm, p_cos, p_sin, rows, T,
    scale, scale_rest, base_sb, base_st, base_sd, reads_sb, reads_st, reads_sh, reads_sr, d_out_sb, d_out_st, d_out_sd,
    weight_sd, weight_sk, norm_sd, cos_sb, cos_st, cos_sd, sin_sb, sin_st, sin_sd, blocks,
    EPS: tl.constexpr, DTYPE: tl.constexpr, D: tl.constexpr, R: tl.constexpr, K: tl.constexpr, HEADS: tl.constexpr,
    UNIT: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """A unit of columns, from a group of `blocks` blocks of rows: d_weight [groups, D, K], d_norm [groups, D]."""
    UNITS: tl.constexpr = (D + UNIT - 1) // UNIT
    i_p = tl.program_id(0).to(tl.int64)
    i_group, i_unit = i_p // UNITS, i_p % UNITS
    factor = load_factor(p_gain, scale, scale_rest, DTYPE)
    i_d, _i_u, m_d = unit_columns(i_unit, D, UNIT, HALF)
    i_k = tl.arange(0, KP).to(tl.int64)
    b_wa = tl.zeros((HALF, KP), DTYPE)
    b_wb = tl.zeros((HALF, KP), DTYPE)
    b_na = tl.zeros((HALF,), DTYPE)
    b_nb = tl.zeros((HALF,), DTYPE)
    for i in range(blocks):
        i_row, i_b, i_t, m_row = row_indices(i_group * blocks + i, rows, T, ROWS)
        p_r = p_reads + i_b * reads_sb + i_t * reads_st
        p_x, p_c, p_s = p_d_out, p_d_out, p_d_out
        if p_base is not None:
            p_x = p_base + i_b * base_sb + i_t * base_st
        if p_cos is not None:
            p_c = p_cos + i_b * cos_sb + i_t * cos_st
            p_s = p_sin + i_b * sin_sb + i_t * sin_st
        b_inverse = tl.zeros((ROWS,), DTYPE)
        b_along = tl.zeros((ROWS,), DTYPE)
        if p_stats is not None:
            b_inverse = tl.load(p_stats + i_row * 2, mask=m_row, other=0.0)
            b_along = tl.load(p_stats + i_row * 2 + 1, mask=m_row, other=0.0)
        b_g, b_d_norm = unit_adjoint(
            p_d_out + i_b * d_out_sb + i_t * d_out_st, p_x, p_r, p_weight, p_norm, None if p_cos is None else p_c, p_s,
            base_sd, reads_sh, reads_sr, d_out_sd, weight_sd, weight_sk, norm_sd, cos_sd, sin_sd, i_unit, m_row, factor,
            b_inverse, b_along, EPS, DTYPE, D, R, K, HEADS, UNIT, HALF, ROWS,
        )  # fmt: skip
        if p_d_norm is not None:
            b_na += tl.sum(b_d_norm[0], axis=0)
            b_nb += tl.sum(b_d_norm[1], axis=0)
        for j in range(K):
            p_j = p_r + (j // R) * tl.cast(reads_sh, tl.int64) + (j % R) * reads_sr
            b_r = tl.load(p_j, mask=m_row, other=0.0).to(DTYPE) * factor
            m_j = i_k[None, :] == j
            b_wa += tl.where(m_j, tl.sum(b_g[0] * b_r[:, None], axis=0)[:, None], 0.0)
            b_wb += tl.where(m_j, tl.sum(b_g[1] * b_r[:, None], axis=0)[:, None], 0.0)
    p_d_weight += i_group * D * K
    m_k = (i_k < K)[None, :]
    tl.store(p_d_weight + (i_d[0] * K)[:, None] + i_k[None, :], b_wa, mask=m_d[0][:, None] & m_k)
    tl.store(p_d_weight + (i_d[1] * K)[:, None] + i_k[None, :], b_wb, mask=m_d[1][:, None] & m_k)
    if p_d_norm is not None:
        tl.store(p_d_norm + i_group * D + i_d[0], b_na, mask=m_d[0])
        tl.store(p_d_norm + i_group * D + i_d[1], b_nb, mask=m_d[1])


def operand_arguments(like, base, reads, weight, gain, norm_weight, cos, sin, scale, norm_eps, head_dim) -> dict:
    """What all kernels are given; like has base's shape."""
    D, K, leading = like.shape[-1], weight.shape[1], like.ndim - 1
    dtype = accumulation_dtype(like, base, reads, weight, gain, norm_weight, cos, sin)
    unit = head_dim or min(COLUMNS, triton.next_power_of_2(D))
    whole = ctypes.c_float(scale).value  # what a kernel is given is float32
    arguments = {
        "p_base": base,
        "p_reads": reads,
        "p_weight": weight,
        "p_gain": gain,
        "p_norm": norm_weight,
        "p_cos": cos,
        "p_sin": sin,
        "rows": like.shape[:-1].numel(),
        "T": like.shape[1] if leading == 2 else 1,
        "scale": whole,
        "scale_rest": scale - whole if math.isfinite(whole) else 0.0,
        "weight_sd": weight.stride(0),
        "weight_sk": weight.stride(1),
        "norm_sd": 1 if norm_weight is None else norm_weight.stride(0),
        "EPS": norm_eps,
        "DTYPE": tl.float64 if dtype == torch.float64 else tl.float32,
        "D": D,
        "R": reads.shape[-1],
        "K": K,
        "HEADS": head_dim > 0,
        "UNIT": unit,
        "HALF": triton.next_power_of_2((unit + 1) // 2),
        "ROWS": ROWS,
        "num_warps": 4,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }
    heads = reads.ndim == like.ndim + 1
    arguments |= _strides("reads", reads, leading) | {"reads_sh": reads.stride(-2) if heads else 0}
    arguments["reads_sr"] = arguments.pop("reads_sd")
    for name, x in (("base", base), ("cos", cos), ("sin", sin)):
        arguments |= _strides(name, x, leading)
    return arguments


def correct_arguments(
    base, reads, weight, gain, norm_weight, cos, sin, scale, norm_eps, head_dim, out
) -> tuple[int, dict]:
    """Programs to launch, and the arguments of correct_kernel."""
    arguments = operand_arguments(
        base, base, reads, weight, gain, norm_weight, cos, sin, scale, norm_eps, head_dim
    ) | _strides("out", out, base.ndim - 1)
    blocks = triton.cdiv(arguments["rows"], ROWS)
    whole = norm_weight is not None and not head_dim
    return blocks * (1 if whole else triton.cdiv(arguments["D"], arguments["UNIT"])), arguments | {"p_out": out}


def correct(base, reads, weight, gain, norm_weight, cos, sin, scale, norm_eps, head_dim, out) -> Tensor:
    """As in backends/reference_correction.py."""
    if out is None:
        out = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    if base.numel():
        programs, arguments = correct_arguments(
            base, reads, weight, gain, norm_weight, cos, sin, scale, norm_eps, head_dim, out
        )
        launch(correct_kernel, programs, arguments, base)
    return out


def backward_arguments(
    d_out, base, reads, weight, gain, norm_weight, cos, sin, scale, norm_eps, head_dim, needs
) -> tuple[tuple[int, dict], tuple[int, dict]]:
    """Programs and arguments of backward_rows_kernel and of backward_columns_kernel, outputs allocated."""
    shared = operand_arguments(d_out, base, reads, weight, gain, norm_weight, cos, sin, scale, norm_eps, head_dim)
    shared |= {"ROWS": BACKWARD_ROWS, "p_d_out": d_out, "KP": triton.next_power_of_2(shared["K"])} | _strides(
        "d_out", d_out, d_out.ndim - 1
    )
    rows, D, K = shared["rows"], shared["D"], shared["K"]
    dtype = torch.float64 if shared["DTYPE"] == tl.float64 else torch.float32
    whole = norm_weight is not None and not head_dim
    stats = d_out.new_empty((rows, 2), dtype=dtype) if whole else None
    by_row = {
        "p_d_base": _empty(d_out) if needs[0] else None,
        "p_d_reads": _empty(reads) if needs[1] else None,
        "p_d_gain": d_out.new_empty((rows,), dtype=dtype) if needs[3] else None,
        "p_stats": stats,
    }
    groups = max(1, min(GROUPS, triton.cdiv(rows, GROUP_ROWS)))
    blocks = triton.cdiv(triton.cdiv(rows, groups), BACKWARD_ROWS)
    by_column = {
        "p_d_weight": d_out.new_empty((groups, D, K), dtype=dtype),
        "p_d_norm": d_out.new_empty((groups, D), dtype=dtype) if norm_weight is not None else None,
        "p_stats": stats,
        "blocks": blocks,
        "num_warps": 4 if head_dim else 8,  # with these nothing spills
    }
    units = triton.cdiv(D, shared["UNIT"])
    return (triton.cdiv(rows, BACKWARD_ROWS), shared | by_row), (groups * units, shared | by_column)


def correct_backward(
    d_out, base, reads, weight, gain, norm_weight, cos, sin, scale, norm_eps, head_dim, needs
) -> list[Tensor | None]:
    """As in backends/reference_correction.py."""
    if not d_out.numel():
        operands = (d_out, reads, weight, gain, norm_weight)
        return [torch.zeros_like(x) if need else None for x, need in zip(operands, needs, strict=True)]
    rows, columns = backward_arguments(
        d_out, base, reads, weight, gain, norm_weight, cos, sin, scale, norm_eps, head_dim, needs
    )
    if any((*needs[:2], needs[3], rows[1]["p_stats"] is not None)):
        launch(backward_rows_kernel, *rows, d_out)
    if needs[2] or needs[4]:
        launch(backward_columns_kernel, *columns, d_out)
    d_weight, d_norm, d_gain = columns[1]["p_d_weight"], columns[1]["p_d_norm"], rows[1]["p_d_gain"]
    return [
        rows[1]["p_d_base"],
        rows[1]["p_d_reads"],
        d_weight.sum(0).to(weight.dtype) if needs[2] else None,
        (d_gain.sum() * scale).to(gain.dtype) if needs[3] else None,
        d_norm.view(-1, norm_weight.shape[0]).sum(0).to(norm_weight.dtype) if needs[4] else None,
    ]


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _strides(name: str, x: Tensor | None, leading: int) -> dict[str, int]:
    """Of batch row, token and number; 0 for a dimension that is the same for all, or not there."""
    if x is None:
        return {f"{name}_s{d}": 1 for d in "btd"}
    steps = [0 if n == 1 else stride for n, stride in zip(x.shape[:leading], x.stride()[:leading], strict=True)]
    b, t = (*steps, 0)[:2]
    return {f"{name}_sb": b, f"{name}_st": t, f"{name}_sd": x.stride(-1)}
