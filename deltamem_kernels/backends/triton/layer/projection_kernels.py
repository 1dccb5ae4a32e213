"""Kernels of the projection, in one pass over x, forward and backward, and the functions that they call.

The columns of a tile are the rows of HEADS heads, head after head, each head padded to RANK columns. q, k, v and the
gates have a tile each.
"""

import triton
import triton.language as tl

from ...reference.projection import NORM_EPS
from ..scan.tiles import store

_NORM_EPS = tl.constexpr(NORM_EPS)
UNSPECIALIZED = [
    *("tokens", "T", "H", "rows", "beta_bias_s", "decay_bias_s"),
    *(f"p_{x}" for x in ("q", "k", "v", "beta", "decay", "norms", "beta_bias", "decay_bias")),
    *(f"p_d{x}" for x in ("q", "k", "v", "beta", "decay", "projected")),
]
"""Arguments whose values and alignment do not matter to the compiler. D and the strides of x and of the weights do: a
load of 16 bytes has to know that they are multiples of it, and they are the same in all calls of a model."""


@triton.jit
def tile_columns(i_g, H, R: tl.constexpr, HEADS: tl.constexpr, RANK: tl.constexpr):
    """Return the head and the state row of each column in the tile of head group i_g, int64, and whether they exist."""
    i_x = tl.arange(0, HEADS * RANK).to(tl.int64)
    i_h, i_r = i_g * HEADS + i_x // RANK, i_x % RANK
    return i_h, i_r, (i_h < H) & (i_r < R)


@triton.jit
def gate_columns(i_h, i_r, m_c, H, R: tl.constexpr, PER_HEAD: tl.constexpr):
    """Return the row of a gate's weight for each column, which columns have one, and the number of rows."""
    if PER_HEAD:
        return i_h, m_c & (i_r == 0), H
    else:
        return i_h * R + i_r, m_c, H * R


@triton.jit
def tanh(b_x):
    """Return tanh(x). Near 0 it is a continued fraction, which keeps the relative error small."""
    DEPTH: tl.constexpr = 9 if b_x.dtype == tl.float64 else 5
    b_z = b_x * b_x
    b_t = b_z * 0 + (2 * DEPTH + 1)
    for i in tl.static_range(DEPTH):
        b_t = (2 * (DEPTH - i) - 1) + b_z / b_t
    b_e = tl.exp(-2 * tl.abs(b_x))
    b_y = (1 - b_e) / (1 + b_e)
    return tl.where(tl.abs(b_x) < 0.6, b_x / b_t, tl.where(b_x < 0, -b_y, b_y))


@triton.jit
def sigmoid(b_x):
    b_e = tl.exp(-tl.abs(b_x))
    return tl.where(b_x < 0, b_e, 1.0) / (1 + b_e)


@triton.jit
def norm_floor(dtype: tl.constexpr):
    """Return the smallest norm. A Python number would be float32 in a float64 kernel too."""
    return tl.full([1, 1], _NORM_EPS, dtype)


@triton.jit
def sum_heads(b_x, HEADS: tl.constexpr, RANK: tl.constexpr):
    """Sum [tokens, HEADS * RANK] over the columns of each head, and put the sum in all of them."""
    b_x = tl.reshape(b_x, [b_x.shape[0], HEADS, RANK])
    b_sum = tl.broadcast_to(tl.sum(b_x, axis=2, keep_dims=True), b_x.shape)
    return tl.reshape(b_sum, [b_x.shape[0], HEADS * RANK])


@triton.jit
def weight_tile(p_w, i_row, m_row, i_d, D, s_r, s_d, dtype: tl.constexpr):
    """Load a tile [BLOCK_D, columns] of W transposed."""
    m = m_row[None, :] & (i_d < D)[:, None]
    return tl.load(p_w + i_row[None, :] * s_r + i_d[:, None] * s_d, mask=m, other=0.0).to(dtype)


@triton.jit
def squash(b_x, m_c, HEADS: tl.constexpr, RANK: tl.constexpr, NORMALIZE: tl.constexpr):
    """Return tanh of Wq x or Wk x divided by its norm, and the norm in all columns of a head."""
    b_norm = b_x
    if NORMALIZE:
        b_x = tl.where(m_c[None, :], tanh(b_x), 0.0)
        b_norm = tl.sqrt(sum_heads(b_x * b_x, HEADS, RANK))
        b_norm = tl.maximum(b_norm, norm_floor(b_x.dtype), propagate_nan=tl.PropagateNan.ALL)
        b_x = b_x / b_norm
    return b_x, b_norm


@triton.jit
def squash_and_store(
    b_x, p_out, p_norms, i_m, m_m, i_h, i_r, m_c, H,
    R: tl.constexpr, HEADS: tl.constexpr, RANK: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Apply squash, and store the result and the norms."""
    m = m_m[:, None] & m_c[None, :]
    b_x, b_norm = squash(b_x, m_c, HEADS, RANK, NORMALIZE)
    if NORMALIZE:
        store(p_norms + i_m[:, None] * H + i_h[None, :], b_norm, m & (i_r == 0)[None, :])
    store(p_out + (i_m[:, None] * H + i_h[None, :]) * R + i_r[None, :], b_x, m)


@triton.jit
def gate_and_store(b_x, p_out, p_bias, s_bias, i_m, m_m, i_row, m_row, rows):
    if p_bias is not None:
        b_x += tl.load(p_bias + i_row * s_bias, mask=m_row, other=0.0).to(b_x.dtype)[None, :]
    store(p_out + i_m[:, None] * rows + i_row[None, :], sigmoid(b_x), m_m[:, None] & m_row[None, :])


@triton.jit
def project_tokens(
    p_x, p_q_weight, p_k_weight, p_v_weight, p_beta_weight, p_beta_bias, p_decay_weight, p_decay_bias,
    p_q, p_k, p_v, p_beta, p_decay, p_norms, i_b, i_t, m_m, i_g, tokens, T, D, H,
    x_sb, x_st, x_sd, qkv_sr, qkv_sd, beta_sr, beta_sd, decay_sr, decay_sd, beta_bias_s, decay_bias_s,
    R: tl.constexpr, BETA_PER_HEAD: tl.constexpr, DECAY_PER_HEAD: tl.constexpr, NORMALIZE: tl.constexpr,
    HEADS: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Project tokens i_t [BLOCK_M] of batch row i_b where m_m is True, for head group i_g. T, D and H are int64."""
    dtype: tl.constexpr = p_q.dtype.element_ty
    DECAY: tl.constexpr = p_decay_weight is not None
    i_m = i_b * T + i_t
    i_h, i_r, m_c = tile_columns(i_g, H, R, HEADS, RANK)
    i_row = i_h * R + i_r
    i_beta, m_beta, beta_rows = gate_columns(i_h, i_r, m_c, H, R, BETA_PER_HEAD)
    i_decay, m_decay, decay_rows = gate_columns(i_h, i_r, m_c, H, R, DECAY_PER_HEAD)
    p_token = p_x + i_b * x_sb + i_t * x_st

    b_q = tl.zeros([BLOCK_M, HEADS * RANK], dtype)
    b_k, b_v, b_beta, b_decay = b_q, b_q, b_q, b_q
    for i_block in range(tl.cdiv(D, BLOCK_D)):
        i_d = i_block * BLOCK_D + tl.arange(0, BLOCK_D)
        m_x = m_m[:, None] & (i_d < D)[None, :]
        b_x = tl.load(p_token[:, None] + i_d[None, :] * x_sd, mask=m_x, other=0.0).to(dtype)
        b_w = weight_tile(p_q_weight, i_row, m_c, i_d, D, qkv_sr, qkv_sd, dtype)
        b_q = tl.dot(b_x, b_w, b_q, input_precision=PRECISION, out_dtype=dtype)
        b_w = weight_tile(p_k_weight, i_row, m_c, i_d, D, qkv_sr, qkv_sd, dtype)
        b_k = tl.dot(b_x, b_w, b_k, input_precision=PRECISION, out_dtype=dtype)
        b_w = weight_tile(p_v_weight, i_row, m_c, i_d, D, qkv_sr, qkv_sd, dtype)
        b_v = tl.dot(b_x, b_w, b_v, input_precision=PRECISION, out_dtype=dtype)
        b_w = weight_tile(p_beta_weight, i_beta, m_beta, i_d, D, beta_sr, beta_sd, dtype)
        b_beta = tl.dot(b_x, b_w, b_beta, input_precision=PRECISION, out_dtype=dtype)
        if DECAY:
            b_w = weight_tile(p_decay_weight, i_decay, m_decay, i_d, D, decay_sr, decay_sd, dtype)
            b_decay = tl.dot(b_x, b_w, b_decay, input_precision=PRECISION, out_dtype=dtype)

    squash_and_store(b_q, p_q, p_norms, i_m, m_m, i_h, i_r, m_c, H, R, HEADS, RANK, NORMALIZE)
    squash_and_store(b_k, p_k, p_norms + tokens * H, i_m, m_m, i_h, i_r, m_c, H, R, HEADS, RANK, NORMALIZE)
    squash_and_store(b_v, p_v, p_norms, i_m, m_m, i_h, i_r, m_c, H, R, HEADS, RANK, False)
    gate_and_store(b_beta, p_beta, p_beta_bias, beta_bias_s, i_m, m_m, i_beta, m_beta, beta_rows)
    if DECAY:
        gate_and_store(b_decay, p_decay, p_decay_bias, decay_bias_s, i_m, m_m, i_decay, m_decay, decay_rows)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def memory_projection_kernel(
    p_x, p_q_weight, p_k_weight, p_v_weight, p_beta_weight, p_beta_bias, p_decay_weight, p_decay_bias,
    p_q, p_k, p_v, p_beta, p_decay, p_norms, tokens, T, D, H,
    x_sb, x_st, x_sd, qkv_sr, qkv_sd, beta_sr, beta_sd, decay_sr, decay_sd, beta_bias_s, decay_bias_s,
    R: tl.constexpr, BETA_PER_HEAD: tl.constexpr, DECAY_PER_HEAD: tl.constexpr, NORMALIZE: tl.constexpr,
    HEADS: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program projects BLOCK_M tokens of one sequence for one group of heads."""
    T, D, H = tl.cast(T, tl.int64), tl.cast(D, tl.int64), tl.cast(H, tl.int64)
    blocks = tl.cdiv(T, BLOCK_M)
    i_b = tl.program_id(0).to(tl.int64) // blocks
    i_t = tl.program_id(0).to(tl.int64) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    project_tokens(
        p_x, p_q_weight, p_k_weight, p_v_weight, p_beta_weight, p_beta_bias, p_decay_weight, p_decay_bias,
        p_q, p_k, p_v, p_beta, p_decay, p_norms, i_b, i_t, i_t < T, tl.program_id(1).to(tl.int64), tokens, T, D, H,
        x_sb, x_st, x_sd, qkv_sr, qkv_sd, beta_sr, beta_sd, decay_sr, decay_sd, beta_bias_s, decay_bias_s,
        R, BETA_PER_HEAD, DECAY_PER_HEAD, NORMALIZE, HEADS, RANK, BLOCK_M, BLOCK_D, PRECISION,
    )  # fmt: skip


@triton.jit
def token_products(
    p_x, x_sd, p_w, i_row, m_row, D, s_r, s_d, dtype: tl.constexpr, RANK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Multiply one token with a few rows of W, to [1, RANK]."""
    b_sum = tl.zeros([BLOCK_D, RANK], dtype)
    for i_block in range(tl.cdiv(D, BLOCK_D)):
        i_d = i_block * BLOCK_D + tl.arange(0, BLOCK_D)
        b_x = tl.load(p_x + i_d * x_sd, mask=i_d < D, other=0.0).to(dtype)
        b_sum += b_x[:, None] * weight_tile(p_w, i_row, m_row, i_d, D, s_r, s_d, dtype)
    return tl.sum(b_sum, axis=0, keep_dims=True)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def memory_projection_token_kernel(
    p_x, p_q_weight, p_k_weight, p_v_weight, p_beta_weight, p_beta_bias, p_decay_weight, p_decay_bias,
    p_q, p_k, p_v, p_beta, p_decay, p_norms, tokens, T, D, H,
    x_sb, x_st, x_sd, qkv_sr, qkv_sd, beta_sr, beta_sd, decay_sr, decay_sd, beta_bias_s, decay_bias_s,
    R: tl.constexpr, BETA_PER_HEAD: tl.constexpr, DECAY_PER_HEAD: tl.constexpr, NORMALIZE: tl.constexpr,
    HEADS: tl.constexpr, RANK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program projects one token to one of q, k, v, beta and decay of one head, so that for few tokens many programs
    read the weights at once."""
    dtype: tl.constexpr = p_q.dtype.element_ty
    T, D, H = tl.cast(T, tl.int64), tl.cast(D, tl.int64), tl.cast(H, tl.int64)
    PARTS: tl.constexpr = 4 if p_decay_weight is None else 5
    i_part = tl.program_id(1) % PARTS
    i_h, i_r, m_c = tile_columns((tl.program_id(1) // PARTS).to(tl.int64), H, R, 1, RANK)
    i_m = tl.program_id(0).to(tl.int64) + tl.zeros([1], tl.int64)
    m_m = i_m < tokens
    i_token = tl.program_id(0).to(tl.int64)
    p_x += i_token // T * x_sb + i_token % T * x_st
    i_row = i_h * R + i_r
    if i_part == 0:
        b_x = token_products(p_x, x_sd, p_q_weight, i_row, m_c, D, qkv_sr, qkv_sd, dtype, RANK, BLOCK_D)
        squash_and_store(b_x, p_q, p_norms, i_m, m_m, i_h, i_r, m_c, H, R, 1, RANK, NORMALIZE)
    elif i_part == 1:
        b_x = token_products(p_x, x_sd, p_k_weight, i_row, m_c, D, qkv_sr, qkv_sd, dtype, RANK, BLOCK_D)
        squash_and_store(b_x, p_k, p_norms + tokens * H, i_m, m_m, i_h, i_r, m_c, H, R, 1, RANK, NORMALIZE)
    elif i_part == 2:
        b_x = token_products(p_x, x_sd, p_v_weight, i_row, m_c, D, qkv_sr, qkv_sd, dtype, RANK, BLOCK_D)
        squash_and_store(b_x, p_v, p_norms, i_m, m_m, i_h, i_r, m_c, H, R, 1, RANK, False)
    elif i_part == 3:
        i_gate, m_gate, gate_rows = gate_columns(i_h, i_r, m_c, H, R, BETA_PER_HEAD)
        b_x = token_products(p_x, x_sd, p_beta_weight, i_gate, m_gate, D, beta_sr, beta_sd, dtype, RANK, BLOCK_D)
        gate_and_store(b_x, p_beta, p_beta_bias, beta_bias_s, i_m, m_m, i_gate, m_gate, gate_rows)
    else:
        if PARTS == 5:
            i_gate, m_gate, gate_rows = gate_columns(i_h, i_r, m_c, H, R, DECAY_PER_HEAD)
            b_x = token_products(p_x, x_sd, p_decay_weight, i_gate, m_gate, D, decay_sr, decay_sd, dtype, RANK, BLOCK_D)
            gate_and_store(b_x, p_decay, p_decay_bias, decay_bias_s, i_m, m_m, i_gate, m_gate, gate_rows)


@triton.jit
def squash_adjoint(
    p_d, p_y, p_norms, i_m, i_h, i_r, m, H,
    dtype: tl.constexpr, R: tl.constexpr, HEADS: tl.constexpr, RANK: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Return the gradient of p from that of y = t / norm, with t = tanh(p). A norm at its floor is a constant."""
    o_y = (i_m[:, None] * H + i_h[None, :]) * R + i_r[None, :]
    if p_d is None:
        return tl.zeros([i_m.shape[0], HEADS * RANK], dtype)
    else:
        b_d = tl.load(p_d + o_y, mask=m, other=0.0).to(dtype)
        if NORMALIZE:
            b_y = tl.load(p_y + o_y, mask=m, other=0.0)
            b_norm = tl.load(p_norms + i_m[:, None] * H + i_h[None, :], mask=m, other=1.0)
            b_along = tl.where(b_norm > norm_floor(dtype), sum_heads(b_d * b_y, HEADS, RANK), 0.0)
            b_t = b_y * b_norm
            b_d = (b_d - b_y * b_along) / b_norm * (1 - b_t * b_t)
        return b_d


@triton.jit
def gate_adjoint(p_d, p_gate, i_m, m_m, i_row, m_row, gate_rows, dtype: tl.constexpr):
    """Return the gradient of p from that of sigmoid(p)."""
    m, o_gate = m_m[:, None] & m_row[None, :], i_m[:, None] * gate_rows + i_row[None, :]
    if p_d is None:
        return tl.zeros([i_m.shape[0], i_row.shape[0]], dtype)
    else:
        b_gate = tl.load(p_gate + o_gate, mask=m, other=0.0)
        return tl.load(p_d + o_gate, mask=m, other=0.0).to(dtype) * b_gate * (1 - b_gate)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def memory_projection_adjoint_kernel(
    p_dq, p_dk, p_dv, p_dbeta, p_ddecay, p_q, p_k, p_beta, p_decay, p_norms, p_dprojected, tokens, H, rows,
    R: tl.constexpr, BETA_PER_HEAD: tl.constexpr, DECAY_PER_HEAD: tl.constexpr, NORMALIZE: tl.constexpr,
    DECAY: tl.constexpr, HEADS: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of Wx + b, [tokens, rows], with q, k, v, beta and decay in this order. All operands are
    contiguous."""
    dtype: tl.constexpr = p_q.dtype.element_ty
    H, rows = tl.cast(H, tl.int64), tl.cast(rows, tl.int64)
    i_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = i_m < tokens
    i_h, i_r, m_c = tile_columns(tl.program_id(1).to(tl.int64), H, R, HEADS, RANK)
    m = m_m[:, None] & m_c[None, :]
    p_out = p_dprojected + i_m[:, None] * rows
    i_row = (i_h * R + i_r)[None, :]
    b_d = squash_adjoint(p_dq, p_q, p_norms, i_m, i_h, i_r, m, H, dtype, R, HEADS, RANK, NORMALIZE)
    store(p_out + i_row, b_d, m)
    b_d = squash_adjoint(p_dk, p_k, p_norms + tokens * H, i_m, i_h, i_r, m, H, dtype, R, HEADS, RANK, NORMALIZE)
    store(p_out + H * R + i_row, b_d, m)
    b_d = squash_adjoint(p_dv, p_q, p_norms, i_m, i_h, i_r, m, H, dtype, R, HEADS, RANK, False)
    store(p_out + 2 * H * R + i_row, b_d, m)
    i_row, m_row, gate_rows = gate_columns(i_h, i_r, m_c, H, R, BETA_PER_HEAD)
    b_d = gate_adjoint(p_dbeta, p_beta, i_m, m_m, i_row, m_row, gate_rows, dtype)
    store(p_out + 3 * H * R + i_row[None, :], b_d, m_m[:, None] & m_row[None, :])
    if DECAY:
        p_out += 3 * H * R + gate_rows
        i_row, m_row, gate_rows = gate_columns(i_h, i_r, m_c, H, R, DECAY_PER_HEAD)
        b_d = gate_adjoint(p_ddecay, p_decay, i_m, m_m, i_row, m_row, gate_rows, dtype)
        store(p_out + i_row[None, :], b_d, m_m[:, None] & m_row[None, :])


@triton.jit(do_not_specialize=UNSPECIALIZED)
def memory_projection_input_kernel(
    p_dprojected, p_w, p_dx, tokens, rows, D, w_sr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of x from that of Wx + b, rounded once. A program takes BLOCK_M tokens and BLOCK_D columns
    of x. W is [rows, D]."""
    dtype: tl.constexpr = p_dprojected.dtype.element_ty
    rows, D = tl.cast(rows, tl.int64), tl.cast(D, tl.int64)
    i_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    i_d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_m, m_d = i_m < tokens, i_d < D
    b_dx = tl.zeros([BLOCK_M, BLOCK_D], dtype)
    for i_block in range(tl.cdiv(rows, BLOCK_N)):
        i_n = i_block * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = i_n < rows
        b_d = tl.load(p_dprojected + i_m[:, None] * rows + i_n[None, :], mask=m_m[:, None] & m_n[None, :], other=0.0)
        b_w = tl.load(p_w + i_n[:, None] * w_sr + i_d[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0)
        b_dx = tl.dot(b_d, b_w.to(dtype), b_dx, input_precision=PRECISION, out_dtype=dtype)
    store(p_dx + i_m[:, None] * D + i_d[None, :], b_dx, m_m[:, None] & m_d[None, :])
