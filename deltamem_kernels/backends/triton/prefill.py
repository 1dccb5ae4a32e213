"""A layer's prefill: memory_projection and, where chunks allow, their maps in the same kernel. What is projected is
written once, and read again by the program that wrote it from the cache beside it."""

# ruff: noqa: RUF005 (tuples have no * here)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import delta_update, memory_projection
from ._rule import combine, gates, store_state, write_row
from .launch import launch
from .maps import chunk_maps_kernel
from .projection import RUN_VARYING, memory_projection_kernel, project_tokens

MAPS_RANK = 8
"""Up to this rank the lanes of a program have room for the virtual rows of its heads: at 16 they spill."""


@triton.jit
def load_step(p_k, p_v, p_beta, p_decay, i_t, k_st, beta_st, decay_st, R: tl.constexpr):
    """k, number after number, then v, beta and decay of token i_t."""
    b_k = ()
    for c in tl.static_range(R):
        b_k = b_k + (tl.load(p_k + i_t * k_st + c),)
    b_beta = tl.load(p_beta + i_t * beta_st)
    b_decay = b_beta
    if p_decay is not None:
        b_decay = tl.load(p_decay + i_t * decay_st)
    return b_k, tl.load(p_v + i_t * k_st), b_beta, b_decay


@triton.jit(do_not_specialize=[*RUN_VARYING, "p_maps"])
def memory_prefill_kernel(
    p_x, p_qkv_weight, p_beta_weight, p_beta_bias, p_decay_weight, p_decay_bias,
    p_q, p_k, p_v, p_beta, p_decay, p_norms, p_maps, tokens, T, D, H,
    x_sb, x_st, x_sd, qkv_sr, qkv_sd, beta_sr, beta_sd, decay_sr, decay_sd, beta_bias_s, decay_bias_s,
    R: tl.constexpr, BETA_PER_HEAD: tl.constexpr, DECAY_PER_HEAD: tl.constexpr, NORMALIZE: tl.constexpr,
    HEADS: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    MODE: tl.constexpr, CHUNK: tl.constexpr, VIRTUAL: tl.constexpr,
):  # fmt: skip
    """A program takes a chunk's tokens and a group of heads: projects them, then runs the chunk's map, as
    chunk_maps_kernel does, with VIRTUAL virtual heads side by side."""
    dtype: tl.constexpr = p_maps.dtype.element_ty
    DECAY: tl.constexpr = p_decay_weight is not None
    T, D, H = tl.cast(T, tl.int64), tl.cast(D, tl.int64), tl.cast(H, tl.int64)
    chunks = tl.cdiv(T, CHUNK)
    i_b, i_chunk = tl.program_id(0).to(tl.int64) // chunks, tl.program_id(0).to(tl.int64) % chunks
    i_g = tl.program_id(1).to(tl.int64)
    i_x = tl.arange(0, BLOCK_M)
    i_t = i_chunk * CHUNK + i_x
    project_tokens(
        p_x, p_qkv_weight, p_beta_weight, p_beta_bias, p_decay_weight, p_decay_bias,
        p_q, p_k, p_v, p_beta, p_decay, p_norms, i_b, i_t, (i_t < T) & (i_x < CHUNK), i_g, tokens, T, D, H,
        x_sb, x_st, x_sd, qkv_sr, qkv_sd, beta_sr, beta_sd, decay_sr, decay_sd, beta_bias_s, decay_bias_s,
        R, BETA_PER_HEAD, DECAY_PER_HEAD, NORMALIZE, HEADS, RANK, BLOCK_M, BLOCK_D, PRECISION,
    )  # fmt: skip
    tl.debug_barrier()  # what other threads of the program have written is there

    i_l = tl.arange(0, VIRTUAL * RANK).to(tl.int64)
    last = tl.minimum((i_g + 1) * HEADS, H) * (R + 1)
    i_u, i_r = i_g * HEADS * (R + 1) + i_l // RANK, i_l % RANK
    m_l = (i_u < last) & (i_r < R)
    i_u, i_r = tl.minimum(i_u, last - 1), tl.minimum(i_r, R - 1)
    i_h, i_m = i_u // (R + 1), i_u % (R + 1)
    first = i_b * T + i_chunk * CHUNK
    i_row = i_h * R + i_r
    p_k += first * H * R + i_h * R
    p_v += first * H * R + i_row
    beta_st = H if BETA_PER_HEAD else H * R
    decay_st = H if DECAY_PER_HEAD else H * R
    p_beta += first * beta_st + (i_h if BETA_PER_HEAD else i_row)
    if DECAY:
        p_decay += first * decay_st + (i_h if DECAY_PER_HEAD else i_row)

    end = tl.minimum(T - i_chunk * CHUNK, CHUNK) - 1
    b_s = ()
    for c in tl.static_range(R):
        b_s = b_s + (tl.where(i_m == c, 1.0, 0.0).to(dtype),)
    ahead = load_step(p_k, p_v, p_beta, p_decay if DECAY else None, 0, H * R, beta_st, decay_st, R)
    for i in range(CHUNK):  # of the last chunk too, whose map nobody asks for: with a branch a register spills
        b_k, b_v, b_beta, b_decay = ahead
        i_next = tl.minimum(i + 1, end)
        ahead = load_step(p_k, p_v, p_beta, p_decay if DECAY else None, i_next, H * R, beta_st, decay_st, R)
        if not DECAY:
            b_decay = 1 - b_beta
        b_keep, b_erase, b_write = gates(b_beta, b_decay, b_beta, MODE)
        b_v = tl.where(i_m == R, b_v, 0.0)
        b_s = combine(b_keep, b_s, write_row(b_s, b_k, b_v, b_erase, b_write, R, 1), b_k, R)
    i_slot = i_b * (T // CHUNK) + i_chunk  # of the chunk behind: the map leads to the state before it
    m_l = m_l & (i_l * 0 + i_chunk + 1 < chunks)
    store_state(p_maps + (i_slot * H * (R + 1) + i_u) * R * R + i_r * R, 1, b_s, m_l, R)


def memory_prefill_forward(x: Tensor, *operands: object) -> tuple[Tensor, ...]:
    """See `composed.memory_prefill_forward`. One launch less where chunks lie where the tiles of the projection do:
    without mask and cu_seqlens."""
    launches, outputs = prefill_launches(x, *operands)
    for each in launches:
        launch(*each, x)
    return outputs


def prefill_launches(
    x, qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias, initial_state, mask, cu_seqlens, heads, normalize,
    mode, save,
) -> tuple[list[tuple], tuple[Tensor, ...]]:  # fmt: skip
    """Kernel, programs and arguments of each launch, and what they fill."""
    kernel, grid, arguments = memory_projection.forward_arguments(
        x, qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias, heads, normalize
    )
    projected = tuple(arguments[f"p_{name}"] for name in ("q", "k", "v", "beta", "decay", "norms"))
    decay = None if decay_weight is None else projected[4]
    scan, outputs = delta_update.forward_launches(
        *projected[:4], decay, None, initial_state, mask, cu_seqlens, mode, save
    )
    R, of_maps = arguments["R"], scan[0][2]
    whole = mask is None and cu_seqlens is None and scan[0][0] is chunk_maps_kernel
    if whole and kernel is memory_projection_kernel and R <= MAPS_RANK and arguments["BLOCK_M"] >= of_maps["CHUNK"]:
        virtual = triton.next_power_of_2(min(heads, arguments["HEADS"]) * (R + 1))
        arguments |= {"p_maps": of_maps["p_maps"], "MODE": mode, "CHUNK": of_maps["CHUNK"], "VIRTUAL": virtual}
        if decay is not None:
            arguments["num_stages"] = 2  # with five sums and three stages a register spills on sm_80
        grid = (x.shape[0] * triton.cdiv(x.shape[1], of_maps["CHUNK"]), grid[1])
        kernel, scan = memory_prefill_kernel, scan[1:]
    return [(kernel, grid, arguments), *scan], (*projected, *outputs)
