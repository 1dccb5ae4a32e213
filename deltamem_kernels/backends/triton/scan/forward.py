"""The forward scan: kernel and launches. A program runs HEADS heads of one sequence, or of one of its chunks, token by
token."""

from __future__ import annotations

import triton
import triton.language as tl

from ....operands import ScanOperands, ScanResult
from ..launch import Launch, run
from .arguments import empty_tokens, pieces_of_work, scan_arguments
from .chunk_states import chunk_state_launches
from .chunks import work_of
from .rule import scan_tokens
from .tiles import UNSPECIALIZED, combine, load_state, program_indices, store_state, token_operands, zero_state


@triton.jit(do_not_specialize=UNSPECIALIZED)
def delta_update_forward_kernel(
    p_reads, p_final, p_checkpoints, p_q, p_k, p_v, p_beta, p_decay, p_write, p_initial, p_mask, p_spans,
    N, T, H,
    q_sb, q_st, q_sh, q_sr, k_sb, k_st, k_sh, k_sr, v_sb, v_st, v_sh, v_sr, beta_sb, beta_st, beta_sh, beta_sr,
    decay_sb, decay_st, decay_sh, decay_sr, write_sb, write_st, write_sh, write_sr,
    initial_sn, initial_sh, initial_sr, initial_sc, mask_sb, mask_st,
    MODE: tl.constexpr, CHUNKED: tl.constexpr, SPAN: tl.constexpr, CHUNK: tl.constexpr, R: tl.constexpr,
    HEADS: tl.constexpr, ROWS: tl.constexpr, NC: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = p_final.dtype.element_ty
    DECAY: tl.constexpr = p_decay is not None
    MASK: tl.constexpr = p_mask is not None
    N, T, H = tl.cast(N, tl.int64), tl.cast(T, tl.int64), tl.cast(H, tl.int64)
    i_w, i_h, i_r, i_k, i_c, i_x, m_r, m_k, m_s = program_indices(tl.program_id(0), H, R, HEADS, ROWS, W)
    i_n, i_b, start, stop, i_slot, i_first, i_last = work_of(i_w, p_spans, N, T, SPAN, CHUNK, CHUNKED)
    x = token_operands(
        p_q, p_k, p_v, p_beta, p_decay, p_write, p_mask, i_b, i_h, i_r, i_k,
        q_sb, q_st, q_sh, q_sr, k_sb, k_st, k_sh, k_sr, v_sb, v_st, v_sh, v_sr, beta_sb, beta_st, beta_sh, beta_sr,
        decay_sb, decay_st, decay_sh, decay_sr, write_sb, write_st, write_sh, write_sr, mask_sb, mask_st,
    )  # fmt: skip

    o_state = i_r * R + i_c
    later = i_x * 0 + i_first > 0  # a mask per lane: the interpreter cannot combine a block and a scalar
    b_s = zero_state(i_x, dtype, NC)
    if p_initial is not None:
        p_initial += i_n * initial_sn + i_h * initial_sh + i_r * initial_sr + i_c * initial_sc
        b_s = load_state(p_initial, tl.cast(initial_sc, tl.int64), m_s & ~later, dtype, NC)
    if CHUNKED:
        p_slot = p_checkpoints + ((i_slot + i_first) * H + i_h) * R * R + o_state
        b_s = combine(1.0, b_s, 1.0, load_state(p_slot, 1, m_s & later, dtype, NC), NC)  # one of the two is zeros
    p_reads += (i_b * T * H + i_h) * R + i_r
    for i_chunk in range(i_first, i_last):
        if p_checkpoints is not None:
            p_slot = p_checkpoints + ((i_slot + i_chunk) * H + i_h) * R * R + o_state
            store_state(p_slot, 1, b_s, m_s & (i_x * 0 + i_chunk > i_first), NC)
        first = start + i_chunk * CHUNK
        b_s = scan_tokens(
            b_s, x, first, tl.minimum(first + CHUNK, stop), p_reads, H * R, p_reads, 0, 0, m_r, m_k, None,
            MODE, DECAY, MASK, True, False, HEADS, ROWS, NC, W,
        )  # fmt: skip
    if CHUNKED:
        m_s = m_s & (i_x * 0 + i_last == tl.cdiv(stop - start, CHUNK))
    store_state(p_final + (i_n * H + i_h) * R * R + o_state, 1, b_s, m_s, NC)


def scan(operands: ScanOperands, save: bool) -> ScanResult:
    """See `Backend.scan`."""
    launches, result = forward_launches(operands, save)
    run(launches, operands.q.device)
    return result


def forward_launches(operands: ScanOperands, save: bool) -> tuple[list[Launch], ScanResult]:
    """Return the launches, and the results that they fill. Slots of checkpoints after the last chunk of a sequence are
    not written, and never read."""
    q = operands.q
    H, R = q.shape[2:]
    scan = scan_arguments(operands)
    chunked = scan["CHUNKED"]
    keep = save or chunked
    reads = empty_tokens(q, scan)
    final_state = q.new_empty((operands.num_sequences, H, R, R), dtype=operands.dtype)
    checkpoints = q.new_empty(operands.checkpoints_shape if keep else (0,), dtype=operands.dtype)
    scan |= {"p_reads": reads, "p_final": final_state, "p_checkpoints": checkpoints if keep else None}
    launches = [Launch(delta_update_forward_kernel, (pieces_of_work(operands, scan),), scan)]
    if chunked:
        launches = chunk_state_launches(scan, operands.cu_seqlens, operands.initial_state, checkpoints) + launches
    return launches, ScanResult(reads, final_state, checkpoints if save else checkpoints.new_empty((0,)))
