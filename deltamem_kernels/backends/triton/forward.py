"""Forward of the delta rule: a program runs HEADS heads of one sequence, token after token."""

import triton
import triton.language as tl

from ._rule import (
    RUN_VARYING,
    load_state,
    operand,
    program_indices,
    scan_tokens,
    sequence_bounds,
    store_state,
    zero_state,
)


@triton.jit(do_not_specialize=RUN_VARYING)
def delta_update_forward_kernel(
    p_reads, p_final, p_checkpoints, p_q, p_k, p_v, p_beta, p_decay, p_write, p_initial, p_mask, p_cu_seqlens, T, H,
    q_sb, q_st, q_sh, q_sr, k_sb, k_st, k_sh, k_sr, v_sb, v_st, v_sh, v_sr, beta_sb, beta_st, beta_sh, beta_sr,
    decay_sb, decay_st, decay_sh, decay_sr, write_sb, write_st, write_sh, write_sr,
    initial_sn, initial_sh, initial_sr, initial_sc, mask_sb, mask_st,
    MODE: tl.constexpr, CHUNK: tl.constexpr, R: tl.constexpr,
    HEADS: tl.constexpr, ROWS: tl.constexpr, NC: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = p_final.dtype.element_ty
    DECAY: tl.constexpr = p_decay is not None
    MASK: tl.constexpr = p_mask is not None
    H = tl.cast(H, tl.int64)
    i_n, i_h, i_r, i_k, i_c, i_x, m_r, m_k, m_s = program_indices(H, R, HEADS, ROWS, W)
    i_b, start, stop = sequence_bounds(p_cu_seqlens, i_n, T)

    q = operand(p_q, i_b, i_h, i_k, q_sb, q_st, q_sh, q_sr)
    k = operand(p_k, i_b, i_h, i_k, k_sb, k_st, k_sh, k_sr)
    v = operand(p_v, i_b, i_h, i_r, v_sb, v_st, v_sh, v_sr)
    beta = operand(p_beta, i_b, i_h, i_r, beta_sb, beta_st, beta_sh, beta_sr)
    decay, write, mask = beta, beta, beta
    if DECAY:
        decay = operand(p_decay, i_b, i_h, i_r, decay_sb, decay_st, decay_sh, decay_sr)
    if MODE == "affine":
        write = operand(p_write, i_b, i_h, i_r, write_sb, write_st, write_sh, write_sr)
    if MASK:
        mask = operand(p_mask, i_b, 0, 0, mask_sb, mask_st, 0, 0)
    x = (q, k, v, beta, decay, write, mask)

    if p_initial is None:
        b_s = zero_state(i_x, dtype, NC)
    else:
        p_initial += i_n * initial_sn + i_h * initial_sh + i_r * initial_sr + i_c * initial_sc
        b_s = load_state(p_initial, tl.cast(initial_sc, tl.int64), m_s, dtype, NC)
    p_reads += (i_b * T * H + i_h) * R + i_r
    o_state = i_r * R + i_c
    # Slot start // CHUNK + i - 1 of the batch row: chunk i of a sequence has room, whatever the others' lengths.
    i_slot = i_b * (T // CHUNK) + start // CHUNK - 1
    for i_chunk in range(tl.cdiv(stop - start, CHUNK)):
        if p_checkpoints is not None:
            p_slot = p_checkpoints + ((i_slot + i_chunk) * H + i_h) * R * R + o_state
            store_state(p_slot, 1, b_s, m_s & (i_chunk > 0), NC)
        first = start + i_chunk * CHUNK
        b_s = scan_tokens(
            b_s, x, first, tl.minimum(first + CHUNK, stop), p_reads, H * R, p_reads, 0, 0, m_r, m_k,
            MODE, DECAY, MASK, True, False, HEADS, ROWS, NC, W,
        )  # fmt: skip
    store_state(p_final + (i_n * H + i_h) * R * R + o_state, 1, b_s, m_s, NC)
