"""Functions for kernels: the delta rule of one token, its adjoint, and the scan over the tokens of a chunk."""

import triton
import triton.language as tl

from .tiles import PREFETCH, combine, decode_token, dot, load_token, store, store_state, unmasked


@triton.jit
def gates(b_beta, b_decay, b_write, MODE: tl.constexpr):
    """Return keep, erase and write of S <- Diag(keep) S - Diag(erase) (S k) k^T + Diag(write) v k^T."""
    if MODE == "affine":  # the three are given separately: beta is erase, decay is keep
        return b_decay, b_beta, b_write
    elif MODE == "no_lambda":
        return b_beta * 0 + 1, b_beta, b_beta
    elif MODE == "standard":
        return b_decay, b_beta, b_beta
    else:  # lambda_outside
        return b_decay, b_decay * b_beta, b_beta


@triton.jit
def gates_adjoint(b_beta, b_decay, b_dkeep, b_derase, b_dwrite, MODE: tl.constexpr, DECAY: tl.constexpr):
    """Return the gradients of beta, decay and write from those of keep, erase and write."""
    if MODE == "affine":
        b_dbeta, b_ddecay = b_derase, b_dkeep
    elif MODE == "lambda_outside":
        b_dbeta, b_ddecay = b_decay * b_derase + b_dwrite, b_dkeep + b_beta * b_derase
    else:
        b_dbeta, b_ddecay = b_derase + b_dwrite, b_dkeep
    if MODE != "no_lambda" and not DECAY:  # decay is 1 - beta
        b_dbeta -= b_ddecay
    return b_dbeta, b_ddecay, b_dwrite


@triton.jit
def write_row(b_s, b_k, b_v, b_erase, b_write, NC: tl.constexpr, W: tl.constexpr):
    """Return what a token adds to each row of the state, along k."""
    return b_write * b_v - b_erase * dot(b_s, b_k, NC, W)


@triton.jit
def state_adjoint(b_g, b_q, b_k, b_keep, b_erased, b_dread, NC: tl.constexpr):
    """Return the gradient of the state before a token from G, that of the state after it, with erased = erase (G k)."""
    # Only the last product has to wait for G k.
    return combine(1.0, combine(b_keep, b_g, b_dread, b_q, NC), -b_erased, b_k, NC)


@triton.jit
def scan_tokens(
    b_s, x, start, stop, p_reads, reads_st, p_history, history_st, history_sc, m_r, m_k, m_v,
    MODE: tl.constexpr, DECAY: tl.constexpr, MASK: tl.constexpr, READS: tl.constexpr, HISTORY: tl.constexpr,
    HEADS: tl.constexpr, ROWS: tl.constexpr, NC: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Return the state after tokens [start, stop), at least one, from the state b_s before them. READS stores each
    token's read. HISTORY stores the state before each token, at p_history + (token - start) * history_st. Lanes outside
    of m_v, if it is given, write no values: they only erase and decay."""
    dtype: tl.constexpr = b_s[0].dtype
    WRITE: tl.constexpr = MODE == "affine"
    AHEAD: tl.constexpr = PREFETCH if W == 1 else 0
    ahead = ()
    for i in tl.static_range(AHEAD):
        ahead = ahead + (load_token(x, tl.minimum(start + i, stop - 1), m_k, READS, DECAY, WRITE, MASK, W),)
    for i_t in range(start, stop):
        i_ahead = tl.minimum(i_t + AHEAD, stop - 1)
        ahead = ahead + (load_token(x, i_ahead, m_k, READS, DECAY, WRITE, MASK, W),)
        token, ahead = ahead[0], ahead[1:]
        b_q, b_k, b_v, b_beta, b_decay, b_write = decode_token(token, dtype, DECAY, MASK, HEADS, ROWS, NC, W)
        b_keep, b_erase, b_write = gates(b_beta, b_decay, b_write, MODE)
        if m_v is not None:
            b_v = tl.where(m_v, b_v, 0.0)
        if READS:
            store(p_reads + i_t * reads_st, unmasked(dot(b_s, b_q, NC, W), token[6], 0.0, dtype, MASK), m_r)
        if HISTORY:
            store_state(p_history + (i_t - start) * history_st, history_sc, b_s, None, NC)
        b_s = combine(b_keep, b_s, write_row(b_s, b_k, b_v, b_erase, b_write, NC, W), b_k, NC)
    return b_s
