"""The correction of a row and its adjoint, for the kernels in correction.py; the formulas are at the top of
backends/reference_correction.py.

A tile is ROWS rows by a unit of 2 * HALF columns, held as its two halves [ROWS, HALF]: of a head, whose halves the
rotary turns into each other, or of any columns where there are no heads. Columns past the last are zeros.
"""

import triton
import triton.language as tl

_ROWS = ("base", "reads", "out", "cos", "sin", "d_out", "d_base")
RUN_VARYING = [
    *("rows", "T", "scale", "scale_rest", "blocks"),
    *(f"p_{x}" for x in (*_ROWS, "weight", "gain", "norm", "d_reads", "d_gain", "stats", "d_weight", "d_norm")),
    *(f"{x}_s{d}" for x in _ROWS for d in "bt"),
]
"""Arguments whose values and alignment are no reason to compile a kernel again."""


@triton.jit
def row_indices(i_block, rows, T, ROWS: tl.constexpr):
    """Of this program's rows, int64 [ROWS]: number, batch row, token; and which exist. T is at least 1."""
    i_row = i_block * ROWS + tl.arange(0, ROWS).to(tl.int64)
    m_row = i_row < rows
    i_row = tl.where(m_row, i_row, 0)
    return i_row, i_row // T, i_row % T, m_row


@triton.jit
def unit_columns(i_unit, D, UNIT: tl.constexpr, HALF: tl.constexpr):
    """Columns of the halves of a unit, int64 [HALF], their places in the unit, and which exist."""
    i_x = tl.arange(0, HALF).to(tl.int64)
    half: tl.constexpr = (UNIT + 1) // 2
    m_a, m_b = i_x < half, (i_x + half < UNIT) & (i_x < half)
    i_a, i_b = i_unit * UNIT + i_x, i_unit * UNIT + half + i_x
    return (i_a, i_b), (i_x, i_x + half), (m_a & (i_a < D), m_b & (i_b < D))


@triton.jit
def load_pair(p_x, i_d, s_d, m_row, m_d, dtype: tl.constexpr):
    """The tile's numbers; p_x [ROWS] points at the rows."""
    b_a = tl.load(p_x[:, None] + (i_d[0] * s_d)[None, :], mask=m_row[:, None] & m_d[0][None, :], other=0.0)
    b_b = tl.load(p_x[:, None] + (i_d[1] * s_d)[None, :], mask=m_row[:, None] & m_d[1][None, :], other=0.0)
    return b_a.to(dtype), b_b.to(dtype)


@triton.jit
def load_vectors(p_x, i_d, s_d, m_d, dtype: tl.constexpr):
    """[1, HALF] for each half, the same for all rows."""
    b_a = tl.load(p_x + i_d[0] * s_d, mask=m_d[0], other=0.0).to(dtype)
    b_b = tl.load(p_x + i_d[1] * s_d, mask=m_d[1], other=0.0).to(dtype)
    return b_a[None, :], b_b[None, :]


@triton.jit
def store_pair(p_x, i_d, s_d, m_row, m_d, b_x):
    store_tile(p_x[:, None] + (i_d[0] * s_d)[None, :], b_x[0], m_row[:, None] & m_d[0][None, :])
    store_tile(p_x[:, None] + (i_d[1] * s_d)[None, :], b_x[1], m_row[:, None] & m_d[1][None, :])


@triton.jit
def store_tile(p_x, b_x, m_x):
    if b_x.dtype == tl.float64 and p_x.dtype.element_ty == tl.bfloat16:
        b_x = b_x.to(tl.float32)  # there is no conversion in one step
    tl.store(p_x, b_x, mask=m_x)


@triton.jit
def load_factor(p_gain, scale, scale_rest, dtype: tl.constexpr):
    """A float is given to a kernel in float32: float64 needs the rest too."""
    factor = tl.cast(scale, dtype) + tl.cast(scale_rest, dtype)
    if p_gain is not None:
        factor = factor * tl.load(p_gain).to(dtype)
    return factor


@triton.jit
def correction(p_reads, reads_sh, reads_sr, p_weight, weight_sd, weight_sk, i_d, m_row, m_d, factor, R: tl.constexpr,
               K: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    """The tile of scale * reads W^T: outer products, one number of the reads after another. p_reads [ROWS]."""
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
    """Over the columns of a tile, [ROWS]."""
    return tl.sum(b_x[0] * b_y[0] + b_x[1] * b_y[1], axis=1)


@triton.jit
def inverse_rms(b_squares, eps, n: tl.constexpr):
    return 1.0 / tl.sqrt(b_squares / n + eps)


@triton.jit
def normed(b_x, b_w, b_inverse):
    return b_x[0] * b_inverse[:, None] * b_w[0], b_x[1] * b_inverse[:, None] * b_w[1]


@triton.jit
def norm_adjoint(b_g, b_x, b_w, b_inverse, b_along):
    """From the gradient of the normed x to that of x; b_along is the mean of g w x, times inverse cubed."""
    b_inverse, b_along = b_inverse[:, None], b_along[:, None]
    return b_g[0] * b_w[0] * b_inverse - b_x[0] * b_along, b_g[1] * b_w[1] * b_inverse - b_x[1] * b_along


@triton.jit
def rotated(b_x, b_cos, b_sin):
    return b_x[0] * b_cos[0] - b_x[1] * b_sin[0], b_x[1] * b_cos[1] + b_x[0] * b_sin[1]


@triton.jit
def rotated_back(b_g, b_cos, b_sin):
    return b_g[0] * b_cos[0] + b_g[1] * b_sin[1], b_g[1] * b_cos[1] - b_g[0] * b_sin[0]
