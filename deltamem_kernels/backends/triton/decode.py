"""memory_decode: a program takes a row and a head, projects its hidden state and goes on to the head's state: what is
projected never leaves the program. The module is not named after its function, see step.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import accumulation_dtype
from ._rule import gates, store
from .correction import correct
from .launch import launch
from .projection import columns, gate_columns, sigmoid, squash, weight_tile
from .step import in_pool

_RUN_VARYING = (
    [*("H", "slots", "pad_slot_id", "beta_bias_s", "decay_bias_s", "indices_sn", "state_sn", "state_sh")]
    + [f"p_{x}" for x in ("state", "indices", "reads", "beta_bias", "decay_bias")]
)  # fmt: skip


@triton.jit
def gate(b_x, p_bias, s_bias, i_row, m_row, dtype: tl.constexpr, PER_HEAD: tl.constexpr):
    """Numbers of the state's rows, [RANK, 1], or the head's one, [1, 1]."""
    if p_bias is not None:
        b_x += tl.load(p_bias + i_row * s_bias, mask=m_row, other=0.0).to(b_x.dtype)[None, :]
    b_x = sigmoid(b_x)
    if PER_HEAD:
        b_x = tl.sum(tl.where(m_row[None, :], b_x, 0.0), axis=1, keep_dims=True)
    return tl.trans(b_x).to(dtype)


@triton.jit(do_not_specialize=_RUN_VARYING)
def memory_decode_kernel(
    p_state, p_x, p_qkv_weight, p_beta_weight, p_beta_bias, p_decay_weight, p_decay_bias, p_indices, p_reads,
    D, H, slots, pad_slot_id, state_sn, state_sh, state_sr, state_sc, x_sn, x_sd, qkv_sr, qkv_sd, beta_sr, beta_sd,
    decay_sr, decay_sd, beta_bias_s, decay_bias_s, indices_sn,
    DTYPE: tl.constexpr, MODE: tl.constexpr, NORMALIZE: tl.constexpr, BETA_PER_HEAD: tl.constexpr,
    DECAY_PER_HEAD: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = p_reads.dtype.element_ty
    DECAY: tl.constexpr = p_decay_weight is not None
    D, H = tl.cast(D, tl.int64), tl.cast(H, tl.int64)
    i_n = tl.program_id(0).to(tl.int64) // H
    i_h, i_r, m_c = columns(tl.program_id(0).to(tl.int64) % H, H, R, 1, RANK)
    # The state first: it comes while the weights are read. A slot for each lane, the same in all.
    i_slot = i_n + i_r * 0
    if p_indices is not None:
        i_slot = tl.load(p_indices + i_slot * indices_sn).to(tl.int64)
    live = in_pool(i_slot, slots, pad_slot_id)
    m_s = (m_c & live)[:, None] & m_c[None, :]
    p_state += (i_slot * state_sn + i_h * state_sh + i_r * state_sr)[:, None] + (i_r * state_sc)[None, :]
    b_s = tl.load(p_state, mask=m_s, other=0.0).to(DTYPE)

    i_row = i_h * R + i_r
    i_beta, m_beta = gate_columns(i_h, i_r, m_c, R, BETA_PER_HEAD)
    i_decay, m_decay = gate_columns(i_h, i_r, m_c, R, DECAY_PER_HEAD)
    p_x += i_n * x_sn
    b_q = tl.zeros([BLOCK_D, RANK], dtype)
    b_k, b_v, b_beta, b_decay = b_q, b_q, b_q, b_q
    for i_block in range(tl.cdiv(D, BLOCK_D)):
        i_d = i_block * BLOCK_D + tl.arange(0, BLOCK_D)
        b_x = tl.load(p_x + i_d * x_sd, mask=i_d < D, other=0.0).to(dtype)[:, None]
        b_q += b_x * weight_tile(p_qkv_weight, i_row, m_c, i_d, D, qkv_sr, qkv_sd, dtype)
        b_k += b_x * weight_tile(p_qkv_weight, H * R + i_row, m_c, i_d, D, qkv_sr, qkv_sd, dtype)
        b_v += b_x * weight_tile(p_qkv_weight, 2 * H * R + i_row, m_c, i_d, D, qkv_sr, qkv_sd, dtype)
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


def decode_arguments(
    state: Tensor,
    x: Tensor,
    qkv_weight: Tensor,
    beta_weight: Tensor,
    beta_bias: Tensor | None,
    decay_weight: Tensor | None,
    decay_bias: Tensor | None,
    state_indices: Tensor | None,
    heads: int,
    normalize: bool,
    mode: str,
    pad_slot_id: int,
) -> tuple[int, dict]:
    """Programs to launch, and the arguments of memory_decode_kernel with the reads allocated."""
    *lead, D = x.shape
    N = x.shape[0]
    H, R = heads, qkv_weight.shape[0] // (3 * heads)
    weights = {"qkv": qkv_weight, "beta": beta_weight, "decay": decay_weight}
    biases = {"beta": beta_bias, "decay": decay_bias}
    dtype = accumulation_dtype(x, *weights.values(), *biases.values())
    rank = triton.next_power_of_2(R)
    arguments = {
        "p_state": state,
        "p_x": x,
        "p_indices": state_indices,
        "p_reads": x.new_empty((*lead, H, R), dtype=dtype),
        "D": D,
        "H": H,
        "slots": state.shape[0],
        "pad_slot_id": pad_slot_id,
        "indices_sn": 0 if state_indices is None else state_indices.stride(0),
        "DTYPE": tl.float64 if torch.float64 in (dtype, state.dtype) else tl.float32,
        "MODE": mode,
        "NORMALIZE": normalize,
        "R": R,
        "RANK": rank,
        "BLOCK_D": max(16, (4096 if dtype == torch.float32 and rank < 128 else 2048) // rank),
        "num_warps": 8,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }
    arguments |= {"x_sn": x.stride(0), "x_sd": x.stride(-1)}
    arguments |= dict(zip(("state_sn", "state_sh", "state_sr", "state_sc"), state.stride(), strict=True))
    for name, weight in weights.items():
        s_r, s_d = (0, 0) if weight is None else weight.stride()
        arguments |= {f"p_{name}_weight": weight, f"{name}_sr": s_r, f"{name}_sd": s_d}
    for name, bias in biases.items():
        weight = weights[name]
        arguments[f"{name.upper()}_PER_HEAD"] = weight is not None and weight.shape[0] != H * R
        arguments |= {f"p_{name}_bias": bias, f"{name}_bias_s": 0 if bias is None else bias.stride(0)}
    return N * H, arguments


def memory_decode(
    state, x, qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias, state_indices, base, delta_weight, gain,
    norm_weight, cos, sin, out, heads, normalize, mode, pad_slot_id, scale, norm_eps, head_dim,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As in backends/composed.py. Slots are not known to the host: one outside of the pool is treated as the pad."""
    programs, arguments = decode_arguments(
        state, x, qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias, state_indices, heads, normalize, mode,
        pad_slot_id,
    )  # fmt: skip
    launch(memory_decode_kernel, programs, arguments, x)
    reads = arguments["p_reads"]
    if delta_weight is None:
        return reads, x.new_empty((0,))
    first = out if base is None else base
    corrected = correct(first, reads, delta_weight, gain, norm_weight, cos, sin, scale, norm_eps, head_dim, out)
    return reads, corrected if out is None else x.new_empty((0,))
