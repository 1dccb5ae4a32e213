"""What precedes a chunked scan: kernels and launches. They compute the states between chunks, or their gradients.

A chunk takes row i of a state, s, to s M_i + b_i. This is the scan itself, run on R + 1 virtual rows for each row: the
unit vectors, which write no values, and zero, which does. In backward the gradient of the state goes through M_i
transposed, because the map of one token is symmetric, and d_reads add to it. This is the same scan, run from a chunk's
last token to its first. Maps are [slots, H, R + 1, R, R]: virtual row, then row i of the state, then its columns.
Virtual row R is b.

The maps are then folded into the states. A sequence with more than one group of chunks is folded in three steps: the
maps of the groups, the states between the groups, and within all groups at once the states between their chunks.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..launch import Launch, cdiv, next_power_of_2, strides
from . import sizes
from .chunks import chunks_of, first_group, first_slot, sequence_of
from .rule import gates, scan_tokens, state_adjoint
from .tiles import (
    PREFETCH,
    UNSPECIALIZED,
    decode_token,
    dot,
    load_row,
    load_token,
    operand,
    program_indices,
    sequence_bounds,
    store_state,
    token_operands,
    unmasked,
)


@triton.jit(do_not_specialize=["p_mask", "p_cu_seqlens", "T", "mask_sb", "mask_st"])
def mask_spans_kernel(p_spans, p_mask, p_cu_seqlens, T, mask_sb, mask_st, BLOCK: tl.constexpr):
    """Store each sequence's batch row, the first token that the mask keeps, and the end of the last one. Chunks counted
    from there do not move with padding."""
    T = tl.cast(T, tl.int64)
    i_n = tl.program_id(0).to(tl.int64)
    i_b, start, stop = sequence_bounds(p_cu_seqlens, i_n, T, 1)
    b_start, b_stop = tl.zeros([BLOCK], tl.int64) + stop, tl.zeros([BLOCK], tl.int64) + start
    for i in range(start, stop, BLOCK):
        i_t = i + tl.arange(0, BLOCK).to(tl.int64)
        m_t = tl.load(p_mask + i_b * mask_sb + i_t * mask_st, mask=i_t < stop, other=0) != 0
        b_start, b_stop = tl.where(m_t, tl.minimum(b_start, i_t), b_start), tl.where(m_t, i_t + 1, b_stop)
    start = tl.min(b_start, axis=0)
    tl.store(p_spans + i_n * 3, i_b)
    tl.store(p_spans + i_n * 3 + 1, start)
    tl.store(p_spans + i_n * 3 + 2, tl.maximum(tl.max(b_stop, axis=0), start))  # no token is kept: empty, at the end


@triton.jit(do_not_specialize=UNSPECIALIZED)
def chunk_maps_kernel(
    p_maps, p_d_reads, p_q, p_k, p_v, p_beta, p_decay, p_write, p_mask, p_spans, N, T, H,
    d_reads_sb, d_reads_st, d_reads_sh, d_reads_sr,
    q_sb, q_st, q_sh, q_sr, k_sb, k_st, k_sh, k_sr, v_sb, v_st, v_sh, v_sr, beta_sb, beta_st, beta_sh, beta_sr,
    decay_sb, decay_st, decay_sh, decay_sr, write_sb, write_st, write_sh, write_sr, mask_sb, mask_st,
    MODE: tl.constexpr, SPAN: tl.constexpr, CHUNK: tl.constexpr, R: tl.constexpr,
    HEADS: tl.constexpr, ROWS: tl.constexpr, NC: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """A program runs HEADS virtual heads of the chunk before a slot or, with d_reads, backward through the chunk after
    it."""
    dtype: tl.constexpr = p_maps.dtype.element_ty
    DECAY: tl.constexpr = p_decay is not None
    MASK: tl.constexpr = p_mask is not None
    WRITE: tl.constexpr = MODE == "affine"
    N, T, H = tl.cast(N, tl.int64), tl.cast(T, tl.int64), tl.cast(H, tl.int64)
    i_slot, i_u, i_r, _, _, _, m_r, _, _ = program_indices(tl.program_id(0), H * (R + 1), R, HEADS, ROWS, W)
    i_h, i_m = i_u // (R + 1), i_u % (R + 1)
    i_n = sequence_of(i_slot, p_spans, N, T, SPAN, CHUNK, 1)
    i_chunk = i_slot - first_slot(p_spans, i_n, T, SPAN, CHUNK)
    if (i_chunk < 1) | (i_chunk >= chunks_of(p_spans, i_n, T, SPAN, CHUNK)):
        return
    i_b, start, stop = sequence_bounds(p_spans, i_n, T, SPAN)
    x = token_operands(
        p_q, p_k, p_v, p_beta, p_decay, p_write, p_mask, i_b, i_h, i_r, i_r,
        q_sb, q_st, q_sh, q_sr, k_sb, k_st, k_sh, k_sr, v_sb, v_st, v_sh, v_sr, beta_sb, beta_st, beta_sh, beta_sr,
        decay_sb, decay_st, decay_sh, decay_sr, write_sb, write_st, write_sh, write_sr, mask_sb, mask_st,
    )  # fmt: skip

    b_s = ()
    for c in tl.static_range(NC):
        b_s = b_s + (tl.where(i_m == c, 1.0, 0.0).to(dtype),)
    m_v = i_m == R
    first = start + i_chunk * CHUNK
    if p_d_reads is None:
        b_s = scan_tokens(
            b_s, x, first - CHUNK, first, p_maps, 0, p_maps, 0, 0, m_r, m_r, m_v,
            MODE, DECAY, MASK, False, False, HEADS, ROWS, NC, W,
        )  # fmt: skip
    else:
        d_reads = operand(p_d_reads, i_b, i_h, i_r, d_reads_sb, d_reads_st, d_reads_sh, d_reads_sr)
        last = tl.minimum(first + CHUNK, stop) - 1
        ahead = ()
        for i in tl.static_range(PREFETCH):
            i_t = tl.maximum(last - i, first)
            ahead = ahead + ((load_token(x, i_t, m_r, True, DECAY, WRITE, MASK, W), load_row(d_reads, i_t)),)
        for i in range(last - first + 1):
            i_t = tl.maximum(last - i - PREFETCH, first)
            ahead = ahead + ((load_token(x, i_t, m_r, True, DECAY, WRITE, MASK, W), load_row(d_reads, i_t)),)
            step, ahead = ahead[0], ahead[1:]
            token, b_dread = step
            b_q, b_k, _b_v, b_beta, b_decay, b_write = decode_token(token, dtype, DECAY, MASK, HEADS, ROWS, NC, W)
            b_keep, b_erase, b_write = gates(b_beta, b_decay, b_write, MODE)
            b_dread = tl.where(m_v, unmasked(b_dread, token[6], 0.0, dtype, MASK), 0.0)
            b_s = state_adjoint(b_s, b_q, b_k, b_keep, b_erase * dot(b_s, b_k, NC, W), b_dread, NC)
    store_state(p_maps + (i_slot * H * (R + 1) + i_u) * R * R + i_r * R, 1, b_s, m_r, NC)


# The fold. The next state of a row needs all numbers of its map, so a lane has one number of the row.


@triton.jit
def load_map(p_maps, i_slot, stride, m_x, R: tl.constexpr):
    """Load column j of the map of a lane's row: M[0, j], ..., M[R - 1, j] and b[j]."""
    b_m = ()
    for m in tl.static_range(R + 1):
        b_m = b_m + (tl.load(p_maps + i_slot * stride + m * R * R, mask=m_x, other=0.0),)
    return b_m


@triton.jit
def follow(b_s, p_maps, stride, first, count, step, p_out, out_stride, m_b, m_x, R: tl.constexpr, C: tl.constexpr):
    """Take the rows b_s through `count` maps, at least one, from slot `first` on by `step`. With p_out, store the rows
    after each map at its slot. Rows outside of m_b take no b."""
    i_row = tl.arange(0, b_s.shape[0]) // C * C
    ahead = ()
    for i in tl.static_range(PREFETCH):
        ahead = ahead + (load_map(p_maps, first + step * tl.minimum(i, count - 1), stride, m_x, R),)
    for i in range(count):
        i_ahead = first + step * tl.minimum(i + PREFETCH, count - 1)
        ahead = ahead + (load_map(p_maps, i_ahead, stride, m_x, R),)
        b_m, ahead = ahead[0], ahead[1:]
        # Two sums halve the chain of dependent additions.
        b_even, b_odd = tl.where(m_b, b_m[R], 0.0), b_s * 0.0
        for m in tl.static_range(R):
            b_product = tl.gather(b_s, i_row + m, 0) * b_m[m]
            if m % 2 == 0:
                b_even += b_product
            else:
                b_odd += b_product
        b_s = b_even + b_odd
        if p_out is not None:
            tl.store(p_out + (first + step * i) * out_stride, b_s, mask=m_x)
    return b_s


@triton.jit
def rows_of(i_p, rows, R: tl.constexpr, LANES: tl.constexpr, C: tl.constexpr):
    """Return the piece of work of program i_p, then each lane's row and column, and whether they exist."""
    groups = tl.cdiv(rows, LANES // C)
    i_x = tl.arange(0, LANES).to(tl.int64)
    i_y, i_c = (i_p % groups) * (LANES // C) + i_x // C, i_x % C
    return i_p // groups, i_y, i_c, (i_y < rows) & (i_c < R)


@triton.jit
def transitions(i_slot, p_spans, N, T, SPAN: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr):
    """Return what slot i_slot of the groups holds: the sequence, the group's number, the sequence's number of groups,
    the group's first slot of a chunk, and its number of chunks (0 if the slot is not in use)."""
    i_n = sequence_of(i_slot, p_spans, N, T, SPAN, CHUNK, GROUP)
    i_group = i_slot - first_group(p_spans, i_n, T, SPAN, CHUNK, GROUP)
    maps = tl.maximum(chunks_of(p_spans, i_n, T, SPAN, CHUNK) - 1, 0)
    first = first_slot(p_spans, i_n, T, SPAN, CHUNK) + 1 + i_group * GROUP
    count = tl.where(i_group < 0, 0, tl.minimum(tl.maximum(maps - i_group * GROUP, 0), GROUP))
    return i_n, i_group, tl.cdiv(maps, GROUP), first, count


@triton.jit(do_not_specialize=UNSPECIALIZED)
def group_maps_kernel(
    p_groups, p_maps, p_spans, N, T, H,
    REVERSE: tl.constexpr, SPAN: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
    R: tl.constexpr, LANES: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Compose the maps of each group's chunks into the map of the group."""
    N, T, H = tl.cast(N, tl.int64), tl.cast(T, tl.int64), tl.cast(H, tl.int64)
    i_slot, i_y, i_c, m_x = rows_of(tl.program_id(0).to(tl.int64), H * (R + 1) * R, R, LANES, C)
    _, _, groups, first, count = transitions(i_slot, p_spans, N, T, SPAN, CHUNK, GROUP)
    if (groups < 2) | (count == 0):
        return
    i_h, i_m, i_r = i_y // R // (R + 1), i_y // R % (R + 1), i_y % R
    stride = H * (R + 1) * R * R
    p_maps += i_h * (R + 1) * R * R + i_r * R + i_c
    b_s = tl.where(i_m == i_c, 1.0, 0.0).to(p_maps.dtype.element_ty)
    begin = first + count - 1 if REVERSE else first
    b_s = follow(b_s, p_maps, stride, begin, count, -1 if REVERSE else 1, None, 0, i_m == R, m_x, R, C)
    tl.store(p_groups + i_slot * stride + i_y * R + i_c, b_s, mask=m_x)


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "p_end", "end_sn", "end_sh", "end_sr", "end_sc"])
def fold_kernel(
    p_states, p_group_states, p_maps, p_end, p_spans, N, T, H, end_sn, end_sh, end_sr, end_sc,
    REVERSE: tl.constexpr, GROUPS: tl.constexpr, SPAN: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
    R: tl.constexpr, LANES: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Compute the states between the chunks of a group or, with GROUPS, between the groups of a sequence: then maps and
    states are those of groups. `end` holds the states (with REVERSE the gradients) to begin with; None means zeros."""
    N, T, H = tl.cast(N, tl.int64), tl.cast(T, tl.int64), tl.cast(H, tl.int64)
    i_slot, i_y, i_c, m_x = rows_of(tl.program_id(0).to(tl.int64), H * R, R, LANES, C)
    if GROUPS:
        i_slot = first_group(p_spans, i_slot, T, SPAN, CHUNK, GROUP)
    i_n, i_group, groups, first, count = transitions(i_slot, p_spans, N, T, SPAN, CHUNK, GROUP)
    outermost = i_group == 0
    if GROUPS:  # nothing begins after the last group
        first = i_slot + (1 if REVERSE else 0)
        count = groups - 1
    elif REVERSE:
        outermost = i_group == groups - 1
    if count <= 0:
        return
    i_h, i_r = i_y // R, i_y % R
    states_stride = H * R * R
    o_state = i_y * R + i_c
    b_s = (o_state * 0).to(p_maps.dtype.element_ty)
    m_end = i_y * 0 + outermost > 0  # a mask per lane: the interpreter cannot combine a block and a scalar
    if p_end is not None:
        p_end += i_n * end_sn + i_h * end_sh + i_r * end_sr + i_c * end_sc
        b_s += tl.load(p_end, mask=m_x & m_end, other=0.0).to(b_s.dtype)
    if p_group_states is not None:
        p_before = p_group_states + (i_slot + (1 if REVERSE else -1)) * states_stride + o_state
        b_s += tl.load(p_before, mask=m_x & ~m_end, other=0.0)
    begin = first + count - 1 if REVERSE else first
    p_maps += i_h * (R + 1) * R * R + i_r * R + i_c
    follow(
        b_s, p_maps, H * (R + 1) * R * R, begin, count, -1 if REVERSE else 1, p_states + o_state, states_stride,
        m_x, m_x, R, C,
    )  # fmt: skip


def chunk_state_launches(
    scan: dict[str, Any], cu_seqlens: Tensor | None, ends: Tensor | None, states: Tensor, d_reads: Tensor | None = None
) -> list[Launch]:
    """Return the launches that fill the slots of `states` `[B, T // 64, H, R, R]`.

    Args:
        scan: the arguments of the scan that follows.
        cu_seqlens: the sequences before the mask is applied.
        ends: `[N, H, R, R]`, the states before the first tokens or, with d_reads, the gradients of the final states.
        d_reads: `[B, T, H, R]`. If given, the slots get the gradients of the states.
    """
    B, slots, H, R = states.shape[:4]
    several_groups = slots > sizes.GROUP
    slots *= B
    launches = []
    if scan["SPAN"] == 3:
        spans = {name: scan[name] for name in ("p_spans", "p_mask", "T", "mask_sb", "mask_st")}
        spans["p_cu_seqlens"] = None if cu_seqlens is None else cu_seqlens.contiguous()
        launches.append(Launch(mask_spans_kernel, (scan["N"],), spans | {"BLOCK": 1024, "num_warps": 4}))

    virtual_heads = H * (R + 1)
    maps = states.new_empty((slots, virtual_heads, R, R))
    tiles = sizes.tiling(virtual_heads, R)
    arguments = {name: scan[name] for name in chunk_maps_kernel.arg_names if name in scan} | tiles
    arguments |= {"p_maps": maps, "p_d_reads": d_reads} | strides("d_reads", d_reads, "bthr")
    launches.append(Launch(chunk_maps_kernel, (slots * cdiv(virtual_heads, tiles["HEADS"]),), arguments))

    columns = next_power_of_2(R)
    rows = max(sizes.LANES // columns, 1)  # per program
    shared = {name: scan[name] for name in ("p_spans", "SPAN", "N", "T", "H", "CHUNK", "R")} | {"GROUP": sizes.GROUP}
    shared |= {"REVERSE": d_reads is not None, "LANES": rows * columns, "C": columns, "num_warps": 1}
    fold = shared | {"p_end": ends} | strides("end", ends, "nhrc")
    programs_of_states = cdiv(H * R, rows)
    group_states, group_slots = None, slots // sizes.GROUP + scan["N"]
    if several_groups:
        group_maps = states.new_empty((group_slots, virtual_heads, R, R))
        group_states = states.new_empty((group_slots, H, R, R))
        programs = group_slots * cdiv(virtual_heads * R, rows)
        arguments = shared | {"p_groups": group_maps, "p_maps": maps}
        launches.append(Launch(group_maps_kernel, (programs,), arguments))
        arguments = fold | {"p_states": group_states, "p_group_states": None, "p_maps": group_maps, "GROUPS": True}
        launches.append(Launch(fold_kernel, (scan["N"] * programs_of_states,), arguments))
    arguments = fold | {"p_states": states, "p_group_states": group_states, "p_maps": maps, "GROUPS": False}
    launches.append(Launch(fold_kernel, (group_slots * programs_of_states,), arguments))
    return launches
