"""Functions for kernels: how a program holds states, its loads and stores, and its sums over rows and columns.

A program holds the states of HEADS heads of one sequence as a tuple of NC tiles:

    W == 1   R tiles [HEADS * ROWS], one per column. A lane keeps a whole state row in registers, and the chain from
             state to state needs no shuffle. q and k are loaded as one block in which each lane has the number of its
             row; `spread_columns` hands each number to all lanes of the head. All blocks have one dimension, because
             with more of them the compiler finds several layouts for one shape and computes everything once in each.
    W > 1    one tile [W, ROWS], for ranks that are too large for registers (HEADS = NC = 1). Numbers per row (v, the
             gates) are [1, ROWS], numbers per column (q, k) are [W, 1].

Lanes past the last head or row read the last one again, so that loads of tokens need no mask. Stores and sums leave
them out. Columns past the last are zeros.

Names: p_ pointer, b_ block of numbers, i_ index, m_ mask, o_ offset; the indices n sequence, b batch row, t token,
h head, r row, k number of q or k, c column, x place within a tile, w piece of work.
"""

import triton
import triton.language as tl

_TOKENS = ("q", "k", "v", "beta", "decay", "write", "mask", "d_reads")
_STATES = ("initial", "d_final")
UNSPECIALIZED = [
    *("N", "T", "H", "p_spans", "work"),
    *(f"p_{x}" for x in _TOKENS + _STATES),
    *(f"{x}_s{d}" for x in _TOKENS for d in "bthr" if f"{x}_s{d}" not in ("q_sr", "k_sr")),
    *(f"{x}_s{d}" for x in _STATES for d in "nhrc"),
]
"""Arguments whose values and alignment do not matter to the compiler, because no load takes two numbers of an operand
at once. The exceptions are q's and k's last strides: with W > 1 a lane has several numbers of q and k, and where the
stride is 1 they share an address."""

PREFETCH = tl.constexpr(2)
"""The number of tokens that a scan loads ahead, so that the chain from state to state does not wait for memory."""


@triton.jit
def program_indices(i_p, H, R: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, W: tl.constexpr):
    """Return the indices of program i_p, int64: w, h, r, k, c, x. Then return which rows, which numbers of q and k, and
    which numbers of a tile exist."""
    i_p = tl.cast(i_p, tl.int64)
    groups = tl.cdiv(H, HEADS)
    i_w, i_h = i_p // groups, (i_p % groups) * HEADS
    if W == 1:
        i_x = tl.arange(0, HEADS * ROWS).to(tl.int64)
        i_h, i_r = i_h + i_x // ROWS, i_x % ROWS
        m_r = (i_h < H) & (i_r < R)
        i_h, i_r = tl.minimum(i_h, H - 1), tl.minimum(i_r, R - 1)
        return i_w, i_h, i_r, i_r, i_x * 0, i_x, m_r, m_r, m_r
    else:
        i_r = tl.arange(0, ROWS)[None, :].to(tl.int64)
        i_c = tl.arange(0, W)[:, None].to(tl.int64)
        m_r, m_c = i_r < R, i_c < R
        return i_w, i_h, tl.minimum(i_r, R - 1), i_c, i_c, i_c * ROWS + i_r, m_r, m_c, m_r & m_c


@triton.jit
def sequence_bounds(p_spans, i_n, T, SPAN: tl.constexpr):
    """Return the batch row, the first token and the end of sequence i_n, int64. p_spans points at cu_seqlens (SPAN = 1,
    batch row 0) or at these three numbers per sequence (SPAN = 3). Tokens are clamped to [0, T]."""
    zero = i_n * 0
    if p_spans is None:
        return i_n, zero, zero + T
    else:
        p_spans += i_n * SPAN
        i_b = zero
        if SPAN == 3:
            i_b = tl.load(p_spans)
            p_spans += 1
        start = tl.minimum(tl.maximum(tl.load(p_spans).to(tl.int64), 0), T)
        stop = tl.minimum(tl.maximum(tl.load(p_spans + 1).to(tl.int64), start), T)
        return i_b, start, stop


@triton.jit
def operand(p_x, i_b, i_h, i_r, s_b, s_t, s_h, s_r):
    """Return pointers to token 0 of an operand [B, T, H, R], and the stride of its tokens."""
    return p_x + i_b * s_b + i_h * s_h + i_r * s_r, tl.cast(s_t, tl.int64)


@triton.jit
def token_operands(
    p_q, p_k, p_v, p_beta, p_decay, p_write, p_mask, i_b, i_h, i_r, i_k,
    q_sb, q_st, q_sh, q_sr, k_sb, k_st, k_sh, k_sr, v_sb, v_st, v_sh, v_sr, beta_sb, beta_st, beta_sh, beta_sr,
    decay_sb, decay_st, decay_sh, decay_sr, write_sb, write_st, write_sh, write_sr, mask_sb, mask_st,
):  # fmt: skip
    """Return the operands for load_token. A missing one is beta."""
    q = operand(p_q, i_b, i_h, i_k, q_sb, q_st, q_sh, q_sr)
    k = operand(p_k, i_b, i_h, i_k, k_sb, k_st, k_sh, k_sr)
    v = operand(p_v, i_b, i_h, i_r, v_sb, v_st, v_sh, v_sr)
    beta = operand(p_beta, i_b, i_h, i_r, beta_sb, beta_st, beta_sh, beta_sr)
    decay, write, mask = beta, beta, beta
    if p_decay is not None:
        decay = operand(p_decay, i_b, i_h, i_r, decay_sb, decay_st, decay_sh, decay_sr)
    if p_write is not None:
        write = operand(p_write, i_b, i_h, i_r, write_sb, write_st, write_sh, write_sr)
    if p_mask is not None:
        mask = operand(p_mask, i_b, 0, 0, mask_sb, mask_st, 0, 0)
    return q, k, v, beta, decay, write, mask


@triton.jit
def load_row(x, i_t):
    return tl.load(x[0] + i_t * x[1])


@triton.jit
def load_columns(x, i_t, m_k, W: tl.constexpr):
    p_x = x[0] + i_t * x[1]
    if W == 1:
        return tl.load(p_x)
    else:
        return tl.load(p_x, mask=m_k, other=0.0)


@triton.jit
def store(p_x, b_x, m_x):
    """Store b_x where m_x is True, rounded to the dtype of the memory."""
    if b_x.dtype == tl.float64 and p_x.dtype.element_ty == tl.bfloat16:
        b_x = b_x.to(tl.float32)  # Triton has no direct conversion
    tl.store(p_x, b_x, mask=m_x)


@triton.jit
def load_tiles(p_x, s_c, NC: tl.constexpr):
    b_x = ()
    for c in tl.static_range(NC):
        b_x = b_x + (tl.load(p_x + c * s_c),)
    return b_x


@triton.jit
def load_state(p_x, s_c, m_s, dtype: tl.constexpr, NC: tl.constexpr):
    b_x = ()
    for c in tl.static_range(NC):
        b_x = b_x + (tl.load(p_x + c * s_c, mask=m_s, other=0.0).to(dtype),)
    return b_x


@triton.jit
def store_state(p_x, s_c, b_x, m_s, NC: tl.constexpr):
    for c in tl.static_range(NC):
        store(p_x + c * s_c, b_x[c], m_s)


@triton.jit
def zero_state(i_x, dtype: tl.constexpr, NC: tl.constexpr):
    b_x = ()
    for c in tl.static_range(NC):
        b_x = b_x + ((i_x * 0).to(dtype),)
    return b_x


@triton.jit
def load_token(
    x, i_t, m_k, QUERY: tl.constexpr, DECAY: tl.constexpr, WRITE: tl.constexpr, MASK: tl.constexpr, W: tl.constexpr
):
    """Load q, k, v, beta, decay, write and mask of a token in their own dtypes. A missing one is k or beta."""
    q, k, v, beta, decay, write, mask = x
    b_k, b_v, b_beta = load_columns(k, i_t, m_k, W), load_row(v, i_t), load_row(beta, i_t)
    b_q, b_decay, b_write, b_mask = b_k, b_beta, b_beta, b_beta
    if QUERY:
        b_q = load_columns(q, i_t, m_k, W)
    if DECAY:
        b_decay = load_row(decay, i_t)
    if WRITE:
        b_write = load_row(write, i_t)
    if MASK:
        b_mask = load_row(mask, i_t)
    return b_q, b_k, b_v, b_beta, b_decay, b_write, b_mask


@triton.jit
def unmasked(b_x, b_mask, value, dtype: tl.constexpr, MASK: tl.constexpr):
    """Convert b_x to dtype and replace a masked token's numbers, NaN included, with `value`."""
    b_x = b_x.to(dtype)
    if MASK:
        b_x = tl.where(b_mask != 0, b_x, value)
    return b_x


@triton.jit
def spread_columns(b_x, HEADS: tl.constexpr, ROWS: tl.constexpr, NC: tl.constexpr, W: tl.constexpr):
    """Spread loaded numbers per column over tiles that match those of a state."""
    if W == 1:
        i_head = tl.arange(0, HEADS * ROWS) // ROWS * ROWS
        b_y = ()
        for c in tl.static_range(NC):
            b_y = b_y + (tl.gather(b_x, i_head + c, 0),)
        return b_y
    else:
        return (b_x,)


@triton.jit
def decode_token(
    token, dtype: tl.constexpr, DECAY: tl.constexpr, MASK: tl.constexpr,
    HEADS: tl.constexpr, ROWS: tl.constexpr, NC: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Convert what load_token returned. A masked token gets q = k = v = beta = write = 0 and decay = 1."""
    b_q, b_k, b_v, b_beta, b_decay, b_write, b_mask = token
    b_q = spread_columns(unmasked(b_q, b_mask, 0.0, dtype, MASK), HEADS, ROWS, NC, W)
    b_k = spread_columns(unmasked(b_k, b_mask, 0.0, dtype, MASK), HEADS, ROWS, NC, W)
    b_v = unmasked(b_v, b_mask, 0.0, dtype, MASK)
    b_beta = unmasked(b_beta, b_mask, 0.0, dtype, MASK)
    if DECAY:
        b_decay = unmasked(b_decay, b_mask, 1.0, dtype, MASK)
    else:
        b_decay = 1 - b_beta
    return b_q, b_k, b_v, b_beta, b_decay, unmasked(b_write, b_mask, 0.0, dtype, MASK)


@triton.jit
def dot(b_x, b_y, NC: tl.constexpr, W: tl.constexpr):
    """Return the products of tiles x and y, summed over the columns."""
    b_sum = b_x[0] * b_y[0]
    for c in tl.static_range(1, NC):
        b_sum += b_x[c] * b_y[c]
    if W > 1:
        b_sum = tl.sum(b_sum, axis=0, keep_dims=True)
    return b_sum


@triton.jit
def scale(b_a, b_x, NC: tl.constexpr):
    """Return the tiles a x, with a number a per row."""
    b_z = ()
    for c in tl.static_range(NC):
        b_z = b_z + (b_a * b_x[c],)
    return b_z


@triton.jit
def combine(b_a, b_x, b_b, b_y, NC: tl.constexpr):
    """Return the tiles a x + b y, with numbers a and b per row."""
    b_z = ()
    for c in tl.static_range(NC):
        b_z = b_z + (b_a * b_x[c] + b_b * b_y[c],)
    return b_z


@triton.jit
def sum_rows(b_x, m_r, R: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, W: tl.constexpr):
    """Sum a tile over the rows of a head: to [W, 1], or to [HEADS * ROWS] with the sum in every lane of the head."""
    if ROWS != R:
        b_x = tl.where(m_r, b_x, 0.0)
    if W == 1:
        b_sum = tl.sum(tl.reshape(b_x, [HEADS, ROWS]), axis=1, keep_dims=True)
        return tl.reshape(tl.broadcast_to(b_sum, [HEADS, ROWS]), [HEADS * ROWS])
    else:
        return tl.sum(b_x, axis=1, keep_dims=True)


@triton.jit
def exchange_halves(b_x, HALF: tl.constexpr):
    """Turn 2 HALF tiles into HALF. Of two lanes that are HALF apart, the lower one gets both lanes' sums of the lower
    tiles, the upper one those of the upper tiles."""
    i_x = tl.arange(0, b_x[0].shape[0])
    upper = (i_x & HALF) != 0
    b_y = ()
    for c in tl.static_range(HALF):
        b_mine, b_other = tl.where(upper, b_x[HALF + c], b_x[c]), tl.where(upper, b_x[c], b_x[HALF + c])
        b_y = b_y + (b_mine + tl.gather(b_other, i_x ^ HALF, 0),)
    return b_y


@triton.jit
def sum_rows_of_tiles(
    b_x, m_r, R: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, NC: tl.constexpr, W: tl.constexpr
):
    """Sum tiles over the rows of a head: one sum per column, laid out as q and k are loaded."""
    if W > 1:
        return sum_rows(b_x[0], m_r, R, HEADS, ROWS, W)
    else:
        b_y = ()
        for c in tl.static_range(ROWS):
            if ROWS == R:
                b_y = b_y + (b_x[c],)
            else:
                b_y = b_y + (tl.where(m_r & (c < NC), b_x[c % NC], 0.0),)
        for i in tl.static_range(1, ROWS):
            if ROWS >> i > 0:
                b_y = exchange_halves(b_y, ROWS >> i)
        return b_y[0]
