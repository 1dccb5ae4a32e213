"""The decoding step: kernel and launch. A program runs the tokens of one row, HEADS heads of it, on a state that stays
in its pool."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ....operands import StepOperands
from ..launch import Launch, cdiv, kernel_dtype, run, strides
from . import sizes
from .arguments import token_arguments
from .rule import gates, write_row
from .tiles import (
    PREFETCH,
    UNSPECIALIZED,
    combine,
    decode_token,
    dot,
    load_row,
    load_state,
    load_token,
    operand,
    program_indices,
    store,
    store_state,
)

_UNSPECIALIZED = (
    [*UNSPECIALIZED, "slots", "pad_slot_id", "accepted_sn"]
    + [f"p_{x}" for x in ("state", "indices", "accepted", "intermediate", "out")]
    + [f"{x}_s{d}" for x in ("out", "intermediate") for d in "bth"]
    + [f"{x}_s{d}" for x, dimensions in (("state", "nh"), ("indices", "nt")) for d in dimensions]
)


@triton.jit
def load_step(x, indices, i_t, m_k, DECAY: tl.constexpr, EACH: tl.constexpr, W: tl.constexpr):
    """Load a token, and the slot that gets the state after it."""
    i_slot = i_t
    if EACH:
        i_slot = load_row(indices, i_t).to(tl.int64)
    return load_token(x, i_t, m_k, True, DECAY, False, False, W), i_slot


@triton.jit
def in_pool(i_slot, slots, pad_slot_id):
    return (i_slot >= 0) & (i_slot < slots) & (i_slot != pad_slot_id)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def delta_step_kernel(
    p_state, p_q, p_k, p_v, p_beta, p_decay, p_indices, p_accepted, p_intermediate, p_out, T, H, slots, pad_slot_id,
    state_sn, state_sh, state_sr, state_sc,
    q_sb, q_st, q_sh, q_sr, k_sb, k_st, k_sh, k_sr, v_sb, v_st, v_sh, v_sr, beta_sb, beta_st, beta_sh, beta_sr,
    decay_sb, decay_st, decay_sh, decay_sr, indices_sn, indices_st, accepted_sn,
    intermediate_sb, intermediate_st, intermediate_sh, intermediate_sr, intermediate_sc, out_sb, out_st, out_sh, out_sr,
    DTYPE: tl.constexpr, MODE: tl.constexpr, EACH: tl.constexpr, LAST: tl.constexpr, R: tl.constexpr,
    HEADS: tl.constexpr, ROWS: tl.constexpr, NC: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    DECAY: tl.constexpr = p_decay is not None
    AHEAD: tl.constexpr = PREFETCH if W == 1 else 0
    H, T = tl.cast(H, tl.int64), tl.cast(T, tl.int64)
    i_n, i_h, i_r, i_k, i_c, _, m_r, m_k, m_s = program_indices(tl.program_id(0), H, R, HEADS, ROWS, W)

    q = operand(p_q, i_n, i_h, i_k, q_sb, q_st, q_sh, q_sr)
    k = operand(p_k, i_n, i_h, i_k, k_sb, k_st, k_sh, k_sr)
    v = operand(p_v, i_n, i_h, i_r, v_sb, v_st, v_sh, v_sr)
    beta = operand(p_beta, i_n, i_h, i_r, beta_sb, beta_st, beta_sh, beta_sr)
    decay, indices = beta, beta
    if DECAY:
        decay = operand(p_decay, i_n, i_h, i_r, decay_sb, decay_st, decay_sh, decay_sr)
    if p_indices is not None:
        indices = operand(p_indices, i_n, i_h, i_r, indices_sn, indices_st, 0, 0)
    x = (q, k, v, beta, decay, beta, beta)
    # The tokens are loaded first, because they do not have to wait for the slot.
    ahead = ()
    for i in tl.static_range(AHEAD):
        ahead = ahead + (load_step(x, indices, tl.minimum(i, T - 1), m_k, DECAY, EACH, W),)

    # Each lane has the slot, the same one, because it is part of the mask of its loads and stores.
    i_start = i_n + i_r * 0
    if p_indices is not None:
        i_start = load_row(indices, 0).to(tl.int64)
    live = in_pool(i_start, slots, pad_slot_id)
    if p_accepted is not None:
        accepted = load_row(operand(p_accepted, i_n, i_h, i_r, accepted_sn, 0, 0, 0), 0).to(tl.int64)
        i_start = load_row(indices, tl.minimum(tl.maximum(accepted, 1), T) - 1).to(tl.int64)
        live = live & (accepted >= 1) & (accepted <= T) & in_pool(i_start, slots, pad_slot_id)
    m_s = m_s & live
    p_state += i_h * state_sh + i_r * state_sr + i_c * state_sc
    state_sc = tl.cast(state_sc, tl.int64)
    b_s = load_state(p_state + i_start * state_sn, state_sc, m_s, DTYPE, NC)

    p_reads, reads_st = operand(p_out, i_n, i_h, i_r, out_sb, out_st, out_sh, out_sr)
    if p_intermediate is not None:
        p_intermediate += i_n * intermediate_sb + i_h * intermediate_sh + i_r * intermediate_sr + i_c * intermediate_sc
        intermediate_sc = tl.cast(intermediate_sc, tl.int64)
    for i_t in range(T):
        ahead = ahead + (load_step(x, indices, tl.minimum(i_t + AHEAD, T - 1), m_k, DECAY, EACH, W),)
        step, ahead = ahead[0], ahead[1:]
        token, i_slot = step
        b_q, b_k, b_v, b_beta, b_decay, b_write = decode_token(token, DTYPE, DECAY, False, HEADS, ROWS, NC, W)
        b_keep, b_erase, b_write = gates(b_beta, b_decay, b_write, MODE)
        store(p_reads + i_t * reads_st, tl.where(live, dot(b_s, b_q, NC, W), 0.0), m_r)
        b_s = combine(b_keep, b_s, write_row(b_s, b_k, b_v, b_erase, b_write, NC, W), b_k, NC)
        if p_intermediate is not None:
            store_state(p_intermediate + i_t * intermediate_st, intermediate_sc, b_s, m_s, NC)
        if EACH:
            m_slot = m_s & in_pool(i_slot, slots, pad_slot_id)
            store_state(p_state + i_slot * state_sn, state_sc, b_s, m_slot, NC)
    if LAST:
        store_state(p_state + i_start * state_sn, state_sc, b_s, m_s, NC)


def step(operands: StepOperands) -> None:
    """See `Backend.step`. The values of slots are not known on the host. A row is treated as padding if its slot is not
    in the pool, or if its number of accepted tokens is not from 1 to T."""
    run([step_launch(operands)], operands.q.device)


def step_launch(operands: StepOperands) -> Launch:
    """Return the launch. Without tokens it has no programs."""
    q, state, slots, states = operands.q, operands.state, operands.state_indices, operands.intermediate_states
    H, R = q.shape[-2:]
    T, tokens = (1, "bhr") if q.ndim == 3 else (q.shape[1], "bthr")
    slot_per_token = operands.update_state and slots is not None and slots.ndim == 2
    arguments: dict[str, Any] = {
        "p_state": state,
        "p_indices": slots,
        "p_accepted": operands.num_accepted_tokens,
        "p_intermediate": states,
        "T": T,
        "H": H,
        "R": R,
        "slots": state.shape[0],
        "pad_slot_id": operands.pad_slot_id,
        "DTYPE": kernel_dtype(operands.dtype),
        "MODE": operands.mode,
        "EACH": slot_per_token,
        "LAST": operands.update_state and not slot_per_token,
    }
    arguments |= token_arguments(operands, ("q", "k", "v", "beta", "decay", "out"), tokens)
    arguments |= strides("state", state, "nhrc") | strides("intermediate", states, "bthrc", f"{tokens}c")
    arguments |= strides("indices", slots, "nt") | strides("accepted", operands.num_accepted_tokens, "n")
    tiles = sizes.tiling(H, R)
    return Launch(delta_step_kernel, (q.shape[0] * cdiv(H, tiles["HEADS"]) if T else 0,), arguments | tiles)
