"""A layer's prefill, which is the projection and the scan: kernel and launches.

Where it can, one kernel computes the projection and the maps of the chunks, which saves a launch. What is projected is
written once. The program that wrote it reads it again from the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....operands import PrefillOperands, Projected, ScanResult
from ..launch import Launch, cdiv, next_power_of_2, run
from ..scan.chunk_states import chunk_maps_kernel
from ..scan.forward import forward_launches
from ..scan.rule import gates, write_row
from ..scan.tiles import combine, store_state
from .projection import projection_launch
from .projection_kernels import UNSPECIALIZED, memory_projection_kernel, project_tokens


@triton.jit
def load_step(p_k, p_v, p_beta, p_decay, i_t, k_st, beta_st, decay_st, R: tl.constexpr):
    """Load k, number by number, then v, beta and decay of token i_t."""
    b_k = ()
    for c in tl.static_range(R):
        b_k = b_k + (tl.load(p_k + i_t * k_st + c),)
    b_beta = tl.load(p_beta + i_t * beta_st)
    b_decay = b_beta
    if p_decay is not None:
        b_decay = tl.load(p_decay + i_t * decay_st)
    return b_k, tl.load(p_v + i_t * k_st), b_beta, b_decay


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "p_maps"])
def memory_prefill_kernel(
    p_x, p_q_weight, p_k_weight, p_v_weight, p_beta_weight, p_beta_bias, p_decay_weight, p_decay_bias,
    p_q, p_k, p_v, p_beta, p_decay, p_norms, p_maps, tokens, T, D, H,
    x_sb, x_st, x_sd, qkv_sr, qkv_sd, beta_sr, beta_sd, decay_sr, decay_sd, beta_bias_s, decay_bias_s,
    R: tl.constexpr, BETA_PER_HEAD: tl.constexpr, DECAY_PER_HEAD: tl.constexpr, NORMALIZE: tl.constexpr,
    HEADS: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    MODE: tl.constexpr, CHUNK: tl.constexpr, VIRTUAL: tl.constexpr,
):  # fmt: skip
    """A program projects a chunk's tokens for a group of heads. Then it computes the chunk's map as chunk_maps_kernel
    does, with VIRTUAL virtual heads at once."""
    dtype: tl.constexpr = p_maps.dtype.element_ty
    DECAY: tl.constexpr = p_decay_weight is not None
    T, D, H = tl.cast(T, tl.int64), tl.cast(D, tl.int64), tl.cast(H, tl.int64)
    chunks = tl.cdiv(T, CHUNK)
    i_b, i_chunk = tl.program_id(0).to(tl.int64) // chunks, tl.program_id(0).to(tl.int64) % chunks
    i_g = tl.program_id(1).to(tl.int64)
    i_x = tl.arange(0, BLOCK_M)
    i_t = i_chunk * CHUNK + i_x
    project_tokens(
        p_x, p_q_weight, p_k_weight, p_v_weight, p_beta_weight, p_beta_bias, p_decay_weight, p_decay_bias,
        p_q, p_k, p_v, p_beta, p_decay, p_norms, i_b, i_t, (i_t < T) & (i_x < CHUNK), i_g, tokens, T, D, H,
        x_sb, x_st, x_sd, qkv_sr, qkv_sd, beta_sr, beta_sd, decay_sr, decay_sd, beta_bias_s, decay_bias_s,
        R, BETA_PER_HEAD, DECAY_PER_HEAD, NORMALIZE, HEADS, RANK, BLOCK_M, BLOCK_D, PRECISION,
    )  # fmt: skip
    tl.debug_barrier()  # the next loads read what other threads of the program stored

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
    for i in range(CHUNK):  # also for the last chunk, whose map is not needed: with a branch, a register spills
        b_k, b_v, b_beta, b_decay = ahead
        i_next = tl.minimum(i + 1, end)
        ahead = load_step(p_k, p_v, p_beta, p_decay if DECAY else None, i_next, H * R, beta_st, decay_st, R)
        if not DECAY:
            b_decay = 1 - b_beta
        b_keep, b_erase, b_write = gates(b_beta, b_decay, b_beta, MODE)
        b_v = tl.where(i_m == R, b_v, 0.0)
        b_s = combine(b_keep, b_s, write_row(b_s, b_k, b_v, b_erase, b_write, R, 1), b_k, R)
    i_slot = i_b * (T // CHUNK) + i_chunk  # the slot of the next chunk: the map leads to the state before it
    m_l = m_l & (i_l * 0 + i_chunk + 1 < chunks)
    store_state(p_maps + (i_slot * H * (R + 1) + i_u) * R * R + i_r * R, 1, b_s, m_l, R)


MAPS_RANK = 8
"""Up to this rank the lanes of a program have room for the virtual rows of its heads. At 16, registers spill."""


def prefill(operands: PrefillOperands, save: bool) -> tuple[Projected, ScanResult]:
    """See `Backend.prefill`."""
    launches, projected, result = prefill_launches(operands, save)
    run(launches, operands.x.device)
    return projected, result


def prefill_launches(operands: PrefillOperands, save: bool) -> tuple[list[Launch], Projected, ScanResult]:
    """Return the launches, and the results that they fill."""
    projection, projected = projection_launch(operands.projection)
    scan, result = forward_launches(operands.scan(projected), save)
    maps, *rest = scan
    if _is_fused(operands, projection, maps):
        return [_fused(operands, projection, maps), *rest], projected, result
    return [projection, *scan], projected, result


def _is_fused(operands: PrefillOperands, projection: Launch, maps: Launch) -> bool:
    """Return whether the projection can compute the maps: each chunk has to be in one tile of the projection."""
    return (
        maps.kernel is chunk_maps_kernel
        and projection.kernel is memory_projection_kernel
        and operands.mask is None
        and operands.cu_seqlens is None
        and maps.arguments["R"] <= MAPS_RANK
        and maps.arguments["CHUNK"] <= projection.arguments["BLOCK_M"]
    )


def _fused(operands: PrefillOperands, projection: Launch, maps: Launch) -> Launch:
    """Return one launch in place of the two."""
    (B, T, _), H, R = operands.x.shape, operands.heads, maps.arguments["R"]
    chunk = maps.arguments["CHUNK"]
    virtual_heads = next_power_of_2(min(H, projection.arguments["HEADS"]) * (R + 1))
    arguments = projection.arguments | {"p_maps": maps.arguments["p_maps"], "MODE": operands.mode}
    arguments |= {"CHUNK": chunk, "VIRTUAL": virtual_heads}
    if operands.decay_weight is not None:
        arguments["num_stages"] = 2  # with five sums and three stages, a register spills on sm_80
    grid = (B * cdiv(T, chunk), cdiv(H, projection.arguments["HEADS"]))
    return Launch(memory_prefill_kernel, grid, arguments)
