"""Kernels of the correction of a projection's output, forward and backward, and the functions that they call. The
formulas are in backends/reference/correction.py.

A tile is ROWS rows of a unit, which is up to 2 * HALF columns: a head, or without heads any columns. It is held as its
two halves [ROWS, HALF], which a rotary embedding turns into each other. Columns past the last are zeros.

Backward uses no atomics. What is summed over rows is summed within groups of rows, which depend only on the number of
rows, and the groups are added in order.
"""

import triton
import triton.language as tl

from ..scan.tiles import store

_ROWS = ("base", "reads", "out", "cos", "sin", "d_out", "d_base")
UNSPECIALIZED = [
    *("rows", "T", "scale", "scale_rest", "blocks"),
    *(f"p_{x}" for x in (*_ROWS, "weight", "gain", "norm", "d_reads", "d_gain", "stats", "d_weight", "d_norm")),
    *(f"{x}_s{d}" for x in _ROWS for d in "bt"),
]
"""Arguments whose values and alignment do not matter to the compiler."""


@triton.jit
def row_indices(i_block, rows, T, ROWS: tl.constexpr):
    """Return the number, batch row and token of a program's rows, int64 [ROWS], and which exist. T is at least 1."""
    i_row = i_block * ROWS + tl.arange(0, ROWS).to(tl.int64)
    m_row = i_row < rows
    i_row = tl.where(m_row, i_row, 0)
    return i_row, i_row // T, i_row % T, m_row


@triton.jit
def unit_columns(i_unit, D, UNIT: tl.constexpr, HALF: tl.constexpr):
    """Return the columns of both halves of a unit, int64 [HALF], their places in the unit, and which exist."""
    i_x = tl.arange(0, HALF).to(tl.int64)
    half: tl.constexpr = (UNIT + 1) // 2
    m_a, m_b = i_x < half, (i_x + half < UNIT) & (i_x < half)
    i_a, i_b = i_unit * UNIT + i_x, i_unit * UNIT + half + i_x
    return (i_a, i_b), (i_x, i_x + half), (m_a & (i_a < D), m_b & (i_b < D))


@triton.jit
def load_pair(p_x, i_d, s_d, m_row, m_d, dtype: tl.constexpr):
    """Load a tile. p_x [ROWS] points at the rows."""
    b_a = tl.load(p_x[:, None] + (i_d[0] * s_d)[None, :], mask=m_row[:, None] & m_d[0][None, :], other=0.0)
    b_b = tl.load(p_x[:, None] + (i_d[1] * s_d)[None, :], mask=m_row[:, None] & m_d[1][None, :], other=0.0)
    return b_a.to(dtype), b_b.to(dtype)


@triton.jit
def load_vectors(p_x, i_d, s_d, m_d, dtype: tl.constexpr):
    """Load [1, HALF] for each half, the same numbers for all rows."""
    b_a = tl.load(p_x + i_d[0] * s_d, mask=m_d[0], other=0.0).to(dtype)
    b_b = tl.load(p_x + i_d[1] * s_d, mask=m_d[1], other=0.0).to(dtype)
    return b_a[None, :], b_b[None, :]


@triton.jit
def store_pair(p_x, i_d, s_d, m_row, m_d, b_x):
    store(p_x[:, None] + (i_d[0] * s_d)[None, :], b_x[0], m_row[:, None] & m_d[0][None, :])
    store(p_x[:, None] + (i_d[1] * s_d)[None, :], b_x[1], m_row[:, None] & m_d[1][None, :])


@triton.jit
def load_factor(p_gain, scale, scale_rest, dtype: tl.constexpr):
    """Return the factor of the correction. Triton passes a float as float32, so float64 needs the rest too."""
    factor = tl.cast(scale, dtype) + tl.cast(scale_rest, dtype)
    if p_gain is not None:
        factor = factor * tl.load(p_gain).to(dtype)
    return factor


@triton.jit
def correction(p_reads, reads_sh, reads_sr, p_weight, weight_sd, weight_sk, i_d, m_row, m_d, factor, R: tl.constexpr,
               K: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    """Return a tile of scale * reads W^T as a sum of outer products, one per number of the reads. p_reads [ROWS]."""
    b_a = tl.zeros((ROWS, HALF), dtype)
    b_b = tl.zeros((ROWS, HALF), dtype)
    for j in range(K):
        p_r = p_reads + (j // R) * tl.cast(reads_sh, tl.int64) + (j % R) * reads_sr
        b_r = tl.load(p_r, mask=m_row, other=0.0).to(dtype) * factor
        b_wa, b_wb = load_vectors(p_weight + j * weight_sk, i_d, weight_sd, m_d, dtype)
        b_a += b_r[:, None] * b_wa
        b_b += b_r[:, None] * b_wb
    return b_a, b_b


@triton.jit
def sum_of_products(b_x, b_y):
    """Sum x y over the columns of a tile, to [ROWS]."""
    return tl.sum(b_x[0] * b_y[0] + b_x[1] * b_y[1], axis=1)


@triton.jit
def inverse_rms(b_squares, eps, n: tl.constexpr):
    return 1.0 / tl.sqrt(b_squares / n + eps)


@triton.jit
def normed(b_x, b_w, b_inverse):
    return b_x[0] * b_inverse[:, None] * b_w[0], b_x[1] * b_inverse[:, None] * b_w[1]


@triton.jit
def norm_adjoint(b_g, b_x, b_w, b_inverse, b_along):
    """Return the gradient of x from that of the normed x. b_along is the mean of g w x, times inverse cubed."""
    b_inverse, b_along = b_inverse[:, None], b_along[:, None]
    return b_g[0] * b_w[0] * b_inverse - b_x[0] * b_along, b_g[1] * b_w[1] * b_inverse - b_x[1] * b_along


@triton.jit
def rotated(b_x, b_cos, b_sin):
    return b_x[0] * b_cos[0] - b_x[1] * b_sin[0], b_x[1] * b_cos[1] + b_x[0] * b_sin[1]


@triton.jit
def rotated_back(b_g, b_cos, b_sin):
    return b_g[0] * b_cos[0] + b_g[1] * b_sin[1], b_g[1] * b_cos[1] - b_g[0] * b_sin[0]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def correct_kernel(
    p_out, p_base, p_reads, p_weight, p_gain, p_norm, p_cos, p_sin, rows, T, scale, scale_rest,
    base_sb, base_st, base_sd, reads_sb, reads_st, reads_sh, reads_sr, out_sb, out_st, out_sd, weight_sd, weight_sk,
    norm_sd, cos_sb, cos_st, cos_sd, sin_sb, sin_st, sin_sd,
    EPS: tl.constexpr, DTYPE: tl.constexpr, D: tl.constexpr, R: tl.constexpr, K: tl.constexpr, HEADS: tl.constexpr,
    UNIT: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program corrects one tile. With a norm over the correction it goes through all tiles of some rows, twice."""
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
    """Return a tile of the correction's gradient, and each row's share of the gradient of norm_weight."""
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


@triton.jit(do_not_specialize=UNSPECIALIZED)
def backward_rows_kernel(
    p_d_base, p_d_reads, p_d_gain, p_stats, p_d_out, p_base, p_reads, p_weight, p_gain, p_norm, p_cos, p_sin, rows, T,
    scale, scale_rest, base_sb, base_st, base_sd, reads_sb, reads_st, reads_sh, reads_sr, d_out_sb, d_out_st, d_out_sd,
    weight_sd, weight_sk, norm_sd, cos_sb, cos_st, cos_sd, sin_sb, sin_st, sin_sd,
    EPS: tl.constexpr, DTYPE: tl.constexpr, D: tl.constexpr, R: tl.constexpr, K: tl.constexpr, HEADS: tl.constexpr,
    UNIT: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Compute the gradients that belong to a row: those of base and reads, and the row's share of the scale's. With a
    norm over the correction, store 1 / rms and the gradient along the correction for the other kernel."""
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
        store(p_d_reads + (i_row * K)[:, None] + i_k[None, :], b_d * factor, m_k)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def backward_columns_kernel(
    p_d_weight, p_d_norm, p_stats, p_d_out, p_base, p_reads, p_weight, p_gain, p_norm, p_cos, p_sin, rows, T,
    scale, scale_rest, base_sb, base_st, base_sd, reads_sb, reads_st, reads_sh, reads_sr, d_out_sb, d_out_st, d_out_sd,
    weight_sd, weight_sk, norm_sd, cos_sb, cos_st, cos_sd, sin_sb, sin_st, sin_sd, blocks,
    EPS: tl.constexpr, DTYPE: tl.constexpr, D: tl.constexpr, R: tl.constexpr, K: tl.constexpr, HEADS: tl.constexpr,
    UNIT: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """A program sums the gradients of a unit of columns over a group of `blocks` blocks of rows, into d_weight
    [groups, D, K] and d_norm [groups, D]."""
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
