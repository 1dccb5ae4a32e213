"""The backward scan: kernel and launches. A program runs HEADS heads of one sequence, or of one of its chunks, from the
last token to the first.

For each chunk it runs the tokens again from the state that forward saved before the chunk, and keeps their states. Then
the gradient of the state goes back through them. All sums over rows stay within the program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....operands import ScanCotangents, ScanOperands
from ...base import Gradients
from ..launch import Launch, run, strides
from . import sizes
from .arguments import empty_tokens, pieces_of_work, scan_arguments
from .chunk_states import chunk_state_launches
from .chunks import work_of
from .rule import gates, gates_adjoint, scan_tokens, state_adjoint, write_row
from .tiles import (
    UNSPECIALIZED,
    combine,
    decode_token,
    dot,
    load_row,
    load_state,
    load_tiles,
    load_token,
    operand,
    program_indices,
    scale,
    store,
    store_state,
    sum_rows,
    sum_rows_of_tiles,
    token_operands,
    unmasked,
    zero_state,
)


@triton.jit
def store_row(
    p_x, b_x, b_mask, i_r, m_r, MASK: tl.constexpr, PER_HEAD: tl.constexpr,
    R: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Store one number per row, or their sum over the rows of a head."""
    b_x = unmasked(b_x, b_mask, 0.0, b_x.dtype, MASK)
    if PER_HEAD:
        b_x = sum_rows(b_x, m_r, R, HEADS, ROWS, W)
        m_r = m_r & (i_r == 0)
    store(p_x, b_x, m_r)


@triton.jit
def store_columns(
    p_x, b_x, b_mask, m_r, m_k, MASK: tl.constexpr,
    R: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, NC: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Store the sums of tiles over the rows of a head."""
    b_sum = sum_rows_of_tiles(b_x, m_r, R, HEADS, ROWS, NC, W)
    store(p_x, unmasked(b_sum, b_mask, 0.0, b_sum.dtype, MASK), m_k)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def delta_update_backward_kernel(
    p_dq, p_dk, p_dv, p_dbeta, p_ddecay, p_dwrite, p_dinitial, p_history, p_checkpoints, p_ends, p_d_reads, p_d_final,
    p_q, p_k, p_v, p_beta, p_decay, p_write, p_initial, p_mask, p_spans, N, T, H, work,
    d_reads_sb, d_reads_st, d_reads_sh, d_reads_sr, d_final_sn, d_final_sh, d_final_sr, d_final_sc,
    q_sb, q_st, q_sh, q_sr, k_sb, k_st, k_sh, k_sr, v_sb, v_st, v_sh, v_sr, beta_sb, beta_st, beta_sh, beta_sr,
    decay_sb, decay_st, decay_sh, decay_sr, write_sb, write_st, write_sh, write_sr,
    initial_sn, initial_sh, initial_sr, initial_sc, mask_sb, mask_st,
    BETA_PER_HEAD: tl.constexpr, DECAY_PER_HEAD: tl.constexpr, WRITE_PER_HEAD: tl.constexpr,
    MODE: tl.constexpr, CHUNKED: tl.constexpr, SPAN: tl.constexpr, CHUNK: tl.constexpr, R: tl.constexpr,
    HEADS: tl.constexpr, ROWS: tl.constexpr, NC: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = p_checkpoints.dtype.element_ty
    DECAY: tl.constexpr = p_decay is not None
    MASK: tl.constexpr = p_mask is not None
    WRITE: tl.constexpr = MODE == "affine"
    # Only the gradients of q, k, beta and decay need the states of the tokens.
    HISTORY: tl.constexpr = p_history is not None
    AHEAD: tl.constexpr = 1 if W == 1 else 0
    N, T, H = tl.cast(N, tl.int64), tl.cast(T, tl.int64), tl.cast(H, tl.int64)
    # A program does several pieces of work, so that the history needs room only for those that run at once.
    for i_p in range(tl.program_id(0), work, tl.num_programs(0)):
        i_w, i_h, i_r, i_k, i_c, i_x, m_r, m_k, m_s = program_indices(i_p, H, R, HEADS, ROWS, W)
        i_n, i_b, start, stop, i_slot, i_first, i_last = work_of(i_w, p_spans, N, T, SPAN, CHUNK, CHUNKED)
        x = token_operands(
            p_q, p_k, p_v, p_beta, p_decay, p_write, p_mask, i_b, i_h, i_r, i_k,
            q_sb, q_st, q_sh, q_sr, k_sb, k_st, k_sh, k_sr, v_sb, v_st, v_sh, v_sr, beta_sb, beta_st, beta_sh, beta_sr,
            decay_sb, decay_st, decay_sh, decay_sr, write_sb, write_st, write_sh, write_sr, mask_sb, mask_st,
        )  # fmt: skip
        d_reads = operand(p_d_reads, i_b, i_h, i_r, d_reads_sb, d_reads_st, d_reads_sh, d_reads_sr)

        b_g = zero_state(i_x, dtype, NC)
        inner = i_x * 0 != 0  # a mask per lane: the interpreter cannot combine a block and a scalar
        if CHUNKED:
            inner = i_x * 0 + i_last < tl.cdiv(stop - start, CHUNK)
        if p_d_final is not None:
            p_end = p_d_final + i_n * d_final_sn + i_h * d_final_sh + i_r * d_final_sr + i_c * d_final_sc
            b_g = load_state(p_end, tl.cast(d_final_sc, tl.int64), m_s & ~inner, dtype, NC)
        if CHUNKED:
            p_slot = p_ends + ((i_slot + i_last) * H + i_h) * R * R + i_r * R + i_c
            m_end = m_s & inner & (i_x * 0 + i_last > 0)
            b_g = combine(1.0, b_g, 1.0, load_state(p_slot, 1, m_end, dtype, NC), NC)  # one of the two is zeros
        history_sc = HEADS * ROWS * W
        history_st = NC * history_sc
        p_states = p_history
        if HISTORY:
            p_states += tl.program_id(0).to(tl.int64) * CHUNK * history_st + i_x
        # Gradients are contiguous, [B, T, H, R], or [B, T, H] for a gate per head.
        o_head = i_b * T * H + i_h + i_r * 0
        o_row, o_column, o_state = o_head * R + i_r, (i_b * T * H + i_h) * R + i_k, i_r * R + i_c

        for i_back in range(i_last - i_first):
            i_chunk = i_last - 1 - i_back
            first = start + i_chunk * CHUNK
            last = tl.minimum(first + CHUNK, stop) - 1
            if HISTORY:
                p_slot = p_checkpoints + ((i_slot + i_chunk) * H + i_h) * R * R + o_state
                later = i_x * 0 + i_chunk > 0
                b_start = load_state(p_slot, 1, m_s & later, dtype, NC)
                if p_initial is not None:
                    p_start = p_initial + i_n * initial_sn + i_h * initial_sh + i_r * initial_sr + i_c * initial_sc
                    b_initial = load_state(p_start, tl.cast(initial_sc, tl.int64), m_s & ~later, dtype, NC)
                    b_start = combine(1.0, b_start, 1.0, b_initial, NC)  # one of the two is zeros
                scan_tokens(
                    b_start, x, first, last + 1, p_states, 0, p_states, history_st, history_sc, m_r, m_k, None,
                    MODE, DECAY, MASK, False, True, HEADS, ROWS, NC, W,
                )  # fmt: skip
                tl.debug_barrier()  # a lane may read what another one stored
            b_s = ()
            if HISTORY:
                b_s = load_tiles(p_states + (last - first) * history_st, history_sc, NC)
            ahead = ()
            for i in tl.static_range(AHEAD):
                i_ahead = tl.maximum(last - i, first)
                token = load_token(x, i_ahead, m_k, True, DECAY, WRITE, MASK, W)
                ahead = ahead + ((token, load_row(d_reads, i_ahead)),)
            for i in range(last - first + 1):
                i_t = last - i
                i_ahead = tl.maximum(i_t - AHEAD, first)
                token = load_token(x, i_ahead, m_k, True, DECAY, WRITE, MASK, W)
                ahead = ahead + ((token, load_row(d_reads, i_ahead)),)
                step, ahead = ahead[0], ahead[1:]
                token, b_dread = step
                b_mask = token[6]
                b_q, b_k, b_v, b_beta, b_decay, b_write = decode_token(token, dtype, DECAY, MASK, HEADS, ROWS, NC, W)
                b_keep, b_erase, b_write = gates(b_beta, b_decay, b_write, MODE)
                b_dread = unmasked(b_dread, b_mask, 0.0, dtype, MASK)
                b_gk = dot(b_g, b_k, NC, W)
                b_erased = b_erase * b_gk
                o_t = i_t * H * R
                if p_dq is not None:
                    b_dq = scale(b_dread, b_s, NC)
                    store_columns(p_dq + o_t + o_column, b_dq, b_mask, m_r, m_k, MASK, R, HEADS, ROWS, NC, W)
                if p_dk is not None:
                    b_dk = combine(write_row(b_s, b_k, b_v, b_erase, b_write, NC, W), b_g, -b_erased, b_s, NC)
                    store_columns(p_dk + o_t + o_column, b_dk, b_mask, m_r, m_k, MASK, R, HEADS, ROWS, NC, W)
                if p_dv is not None:
                    store_row(p_dv + o_t + o_row, b_write * b_gk, b_mask, i_r, m_r, MASK, False, R, HEADS, ROWS, W)
                b_dwrite = b_v * b_gk
                b_dkeep, b_derase = b_dwrite, b_dwrite
                if HISTORY:
                    b_dkeep, b_derase = dot(b_g, b_s, NC, W), -b_gk * dot(b_s, b_k, NC, W)
                    # Loaded only now, because two states at once need too many registers.
                    b_s = load_tiles(p_states + (tl.maximum(i_t - 1, first) - first) * history_st, history_sc, NC)
                b_dbeta, b_ddecay, b_dwrite = gates_adjoint(b_beta, b_decay, b_dkeep, b_derase, b_dwrite, MODE, DECAY)
                if p_dbeta is not None:
                    p_out = p_dbeta + (i_t * H + o_head if BETA_PER_HEAD else o_t + o_row)
                    store_row(p_out, b_dbeta, b_mask, i_r, m_r, MASK, BETA_PER_HEAD, R, HEADS, ROWS, W)
                if p_ddecay is not None:
                    p_out = p_ddecay + (i_t * H + o_head if DECAY_PER_HEAD else o_t + o_row)
                    store_row(p_out, b_ddecay, b_mask, i_r, m_r, MASK, DECAY_PER_HEAD, R, HEADS, ROWS, W)
                if p_dwrite is not None:
                    p_out = p_dwrite + (i_t * H + o_head if WRITE_PER_HEAD else o_t + o_row)
                    store_row(p_out, b_dwrite, b_mask, i_r, m_r, MASK, WRITE_PER_HEAD, R, HEADS, ROWS, W)
                b_g = state_adjoint(b_g, b_q, b_k, b_keep, b_erased, b_dread, NC)
            if HISTORY:
                tl.debug_barrier()  # the next chunk's states overwrite this one's
        if p_dinitial is not None:
            if CHUNKED:
                m_s = m_s & (i_x * 0 + i_first == 0)
            store_state(p_dinitial + (i_n * H + i_h) * R * R + o_state, 1, b_g, m_s, NC)


def scan_backward(
    operands: ScanOperands, checkpoints: Tensor, cotangents: ScanCotangents, needs: list[bool]
) -> Gradients:
    """See `Backend.scan_backward`."""
    launches, gradients = backward_launches(operands, checkpoints, cotangents, needs)
    if any(x is not None for x in gradients):
        run(launches, operands.q.device)
    return gradients


def backward_launches(
    operands: ScanOperands, checkpoints: Tensor, cotangents: ScanCotangents, needs: list[bool]
) -> tuple[list[Launch], Gradients]:
    """Return the launches, and the gradients that they fill."""
    q, state, d_final = operands.q, operands.initial_state, cotangents.final_state
    d_reads = q.new_zeros(()).expand(q.shape) if cotangents.reads is None else cotangents.reads
    scan = scan_arguments(operands)
    *of_tokens, needs_state = needs
    d_q, d_k, d_v, d_beta, d_decay, d_write = (
        empty_tokens(x, scan) if need and x is not None else None
        for x, need in zip(operands.differentiable, of_tokens, strict=False)
    )
    d_initial = state.new_empty(state.shape) if needs_state and state is not None else None
    scan |= {"p_dq": d_q, "p_dk": d_k, "p_dv": d_v, "p_dbeta": d_beta, "p_ddecay": d_decay, "p_dwrite": d_write}
    scan |= {"p_dinitial": d_initial, "p_checkpoints": checkpoints, "work": pieces_of_work(operands, scan)}
    scan |= {"p_d_reads": d_reads, "p_d_final": d_final}
    scan |= strides("d_reads", d_reads, "bthr") | strides("d_final", d_final, "nhrc")
    for name, gate in (("BETA", operands.beta), ("DECAY", operands.decay), ("WRITE", operands.write)):
        scan[f"{name}_PER_HEAD"] = gate is not None and gate.ndim == 3

    # The states of one chunk's tokens for each program: in float32, 16 KiB per head at R = 8 and 64 KiB at R = 16.
    history = sizes.CHUNK * scan["HEADS"] * scan["ROWS"] * scan["W"] * scan["NC"]
    programs = min(scan["work"], max(1, sizes.HISTORY_BYTES // (history * checkpoints.element_size())))
    needs_history = any(x is not None for x in (d_q, d_k, d_beta, d_decay))
    scan["p_history"] = checkpoints.new_empty((programs, history)) if needs_history else None
    scan["p_ends"] = ends = torch.empty_like(checkpoints) if scan["CHUNKED"] else None
    launches = [Launch(delta_update_backward_kernel, (programs,), scan)]
    if ends is not None:
        launches = chunk_state_launches(scan, operands.cu_seqlens, d_final, ends, d_reads) + launches
    return launches, [d_q, d_k, d_v, d_beta, d_decay, d_write, d_initial]
