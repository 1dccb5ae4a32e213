"""Prefill and a decoding step of a layer as the operations they are made of, for backends without kernels of them."""

from __future__ import annotations

import torch
from torch import Tensor


def memory_decode(
    backend,
    state: Tensor,
    x: Tensor,
    qkv_weight: Tensor,
    beta_weight: Tensor,
    beta_bias: Tensor | None,
    decay_weight: Tensor | None,
    decay_bias: Tensor | None,
    state_indices: Tensor | None,
    base: Tensor | None,
    delta_weight: Tensor | None,
    gain: Tensor | None,
    norm_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    out: Tensor | None,
    heads: int,
    normalize: bool,
    mode: str,
    pad_slot_id: int,
    scale: float,
    norm_eps: float,
    head_dim: int,
) -> tuple[Tensor, Tensor]:
    """reads `[N, H, R]` (`[N, 1, H, R]` where x has that dimension) in the dtype of the projection, and the corrected
    base: empty where `out` gets it, or where there is no delta_weight. A base of None is out, in place. The state is
    updated in place."""
    q, k, v, beta, decay, _ = backend.memory_projection_forward(
        x, qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias, heads, normalize
    )
    reads = torch.empty_like(q)
    backend.delta_step(
        state, q, k, v, beta, None if decay_weight is None else decay, state_indices, None, None, reads, mode,
        pad_slot_id, True,
    )  # fmt: skip
    if delta_weight is None:
        return reads, x.new_empty((0,))
    corrected = backend.correct(
        out if base is None else base, reads, delta_weight, gain, norm_weight, cos, sin, scale, norm_eps, head_dim, out
    )
    return reads, corrected if out is None else x.new_empty((0,))


def memory_prefill_forward(
    backend,
    x: Tensor,
    qkv_weight: Tensor,
    beta_weight: Tensor,
    beta_bias: Tensor | None,
    decay_weight: Tensor | None,
    decay_bias: Tensor | None,
    initial_state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    heads: int,
    normalize: bool,
    mode: str,
    save: bool,
) -> tuple[Tensor, ...]:
    """What memory_projection_forward returns of x `[B, T, D]`, six tensors, then what delta_update_forward does of
    these: reads, final_state and checkpoints."""
    projected = backend.memory_projection_forward(
        x, qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias, heads, normalize
    )
    q, k, v, beta, decay, _ = projected
    decay = None if decay_weight is None else decay
    scanned = backend.delta_update_forward(q, k, v, beta, decay, None, initial_state, mask, cu_seqlens, mode, save)
    return *projected, *scanned
