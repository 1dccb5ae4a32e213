"""One decoding step of a layer as the three operations it is made of, for the backends that have no kernel for it."""

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
