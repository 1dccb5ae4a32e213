"""A layer's decoding step: kernel and launches. A program projects the hidden state of one row for one head and steps
the head's state. What is projected never leaves the program. The correction is another launch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....operands import DecodeOperands
from ...base import Decoded
from ..launch import Launch, kernel_dtype, next_power_of_2, run, strides
from ..scan.rule import gates
from ..scan.step import in_pool
from ..scan.tiles import store
from .correction import correct
from .projection import weight_arguments
from .projection_kernels import gate_columns, sigmoid, squash, tile_columns, weight_tile

_UNSPECIALIZED = (
    [*("H", "slots", "pad_slot_id", "beta_bias_s", "decay_bias_s", "indices_sn", "state_sn", "state_sh")]
    + [f"p_{x}" for x in ("state", "indices", "reads", "beta_bias", "decay_bias")]
)  # fmt: skip


@triton.jit
def gate(b_x, p_bias, s_bias, i_row, m_row, dtype: tl.constexpr, PER_HEAD: tl.constexpr):
    """Return the gate per state row, [RANK, 1], or per head, [1, 1]."""
    if p_bias is not None:
        b_x += tl.load(p_bias + i_row * s_bias, mask=m_row, other=0.0).to(b_x.dtype)[None, :]
    b_x = sigmoid(b_x)
    if PER_HEAD:
        b_x = tl.sum(tl.where(m_row[None, :], b_x, 0.0), axis=1, keep_dims=True)
    return tl.trans(b_x).to(dtype)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def memory_decode_kernel(
    p_state, p_x, p_q_weight, p_k_weight, p_v_weight, p_beta_weight, p_beta_bias, p_decay_weight, p_decay_bias,
    p_indices, p_reads, D, H, slots, pad_slot_id, state_sn, state_sh, state_sr, state_sc, x_sn, x_sd, qkv_sr, qkv_sd,
    beta_sr, beta_sd, decay_sr, decay_sd, beta_bias_s, decay_bias_s, indices_sn,
    DTYPE: tl.constexpr, MODE: tl.constexpr, NORMALIZE: tl.constexpr, BETA_PER_HEAD: tl.constexpr,
    DECAY_PER_HEAD: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = p_reads.dtype.element_ty
    DECAY: tl.constexpr = p_decay_weight is not None
    D, H = tl.cast(D, tl.int64), tl.cast(H, tl.int64)
    i_n = tl.program_id(0).to(tl.int64) // H
    i_h, i_r, m_c = tile_columns(tl.program_id(0).to(tl.int64) % H, H, R, 1, RANK)
    # The state is loaded first, so that it arrives while the weights are read. Each lane has the slot, the same one.
    i_slot = i_n + i_r * 0
    if p_indices is not None:
        i_slot = tl.load(p_indices + i_slot * indices_sn).to(tl.int64)
    live = in_pool(i_slot, slots, pad_slot_id)
    m_s = (m_c & live)[:, None] & m_c[None, :]
    p_state += (i_slot * state_sn + i_h * state_sh + i_r * state_sr)[:, None] + (i_r * state_sc)[None, :]
    b_s = tl.load(p_state, mask=m_s, other=0.0).to(DTYPE)

    i_row = i_h * R + i_r
    i_beta, m_beta, _ = gate_columns(i_h, i_r, m_c, H, R, BETA_PER_HEAD)
    i_decay, m_decay, _ = gate_columns(i_h, i_r, m_c, H, R, DECAY_PER_HEAD)
    p_x += i_n * x_sn
    b_q = tl.zeros([BLOCK_D, RANK], dtype)
    b_k, b_v, b_beta, b_decay = b_q, b_q, b_q, b_q
    for i_block in range(tl.cdiv(D, BLOCK_D)):
        i_d = i_block * BLOCK_D + tl.arange(0, BLOCK_D)
        b_x = tl.load(p_x + i_d * x_sd, mask=i_d < D, other=0.0).to(dtype)[:, None]
        b_q += b_x * weight_tile(p_q_weight, i_row, m_c, i_d, D, qkv_sr, qkv_sd, dtype)
        b_k += b_x * weight_tile(p_k_weight, i_row, m_c, i_d, D, qkv_sr, qkv_sd, dtype)
        b_v += b_x * weight_tile(p_v_weight, i_row, m_c, i_d, D, qkv_sr, qkv_sd, dtype)
        b_beta += b_x * weight_tile(p_beta_weight, i_beta, m_beta, i_d, D, beta_sr, beta_sd, dtype)
        if DECAY:
            b_decay += b_x * weight_tile(p_decay_weight, i_decay, m_decay, i_d, D, decay_sr, decay_sd, dtype)

    b_q, _ = squash(tl.sum(b_q, axis=0, keep_dims=True), m_c, 1, RANK, NORMALIZE)
    b_k, _ = squash(tl.sum(b_k, axis=0, keep_dims=True), m_c, 1, RANK, NORMALIZE)
    b_q, b_k = b_q.to(DTYPE), b_k.to(DTYPE)
    b_v = tl.trans(tl.sum(b_v, axis=0, keep_dims=True)).to(DTYPE)
    b_beta = tl.sum(b_beta, axis=0, keep_dims=True)
    b_beta = gate(b_beta, p_beta_bias, beta_bias_s, i_beta, m_beta, DTYPE, BETA_PER_HEAD)
    if DECAY:
        b_decay = tl.sum(b_decay, axis=0, keep_dims=True)
        b_decay = gate(b_decay, p_decay_bias, decay_bias_s, i_decay, m_decay, DTYPE, DECAY_PER_HEAD)
    else:
        b_decay = 1 - b_beta
    b_keep, b_erase, b_write = gates(b_beta, b_decay, b_beta, MODE)

    store(p_reads + (i_n * H + i_h) * R + i_r, tl.where(live, tl.sum(b_s * b_q, axis=1), 0.0).to(dtype), m_c)
    b_row = b_write * b_v - b_erase * tl.sum(b_s * b_k, axis=1, keep_dims=True)
    store(p_state, b_keep * b_s + b_row * b_k, m_s)


def decode(operands: DecodeOperands) -> Decoded:
    """See `Backend.decode`. The values of slots are not known on the host. A row whose slot is not in the pool is
    treated as padding."""
    launch, reads = decode_launch(operands)
    run([launch], operands.x.device)
    nothing = operands.x.new_empty((0,))
    if operands.delta_weight is None:
        return Decoded(reads, nothing)
    corrected = correct(operands.correction(reads), operands.out)
    return Decoded(reads, corrected if operands.out is None else nothing)


def decode_launch(operands: DecodeOperands) -> tuple[Launch, Tensor]:
    """Return the launch of projection and step, and the reads that it fills."""
    x, state, slots, projection = operands.x, operands.state, operands.state_indices, operands.projection
    *lead, D = x.shape
    H, R, dtype = operands.heads, projection.rank, projection.dtype
    reads = x.new_empty((*lead, H, R), dtype=dtype)
    rank = next_power_of_2(R)
    arguments: dict[str, Any] = {
        "p_state": state,
        "p_x": x,
        "p_indices": slots,
        "p_reads": reads,
        "D": D,
        "H": H,
        "slots": state.shape[0],
        "pad_slot_id": operands.pad_slot_id,
        "DTYPE": kernel_dtype(torch.promote_types(dtype, state.dtype)),
        "MODE": operands.mode,
        "NORMALIZE": operands.normalize,
        "R": R,
        "RANK": rank,
        "BLOCK_D": max(16, (4096 if dtype == torch.float32 and rank < 128 else 2048) // rank),
        "num_warps": 8,
    }
    arguments |= weight_arguments(projection, dtype) | strides("state", state, "nhrc") | strides("indices", slots, "n")
    arguments |= {"x_sn": x.stride(0), "x_sd": x.stride(-1)}
    return Launch(memory_decode_kernel, (x.shape[0] * H,), arguments), reads
