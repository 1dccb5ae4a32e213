"""`layer_step`: all that a layer's memory does for one token while decoding, in one native call on a CPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.eager import eager
from ..operands import LayerStepOperands, LayerStepWeights
from ..operands.checks import check_backend
from .attention_correction import attention_correction
from .memory_decode import memory_decode


class LayerStep(NamedTuple):
    """What `layer_step` returns."""

    reads: Tensor
    """`[B, H, R]`, or `[B, 1, H, R]`; float32, or float64 where an operand of the projection is."""
    state: Tensor
    """`[B, H, R, R]`, a new tensor of the given state's dtype."""
    corrections: tuple[Tensor, ...]
    """Each `[B, out]`, or `[B, 1, out]`, in the dtype of the reads, to be added to a projection's output."""


def layer_step(
    x: Tensor, state: Tensor | None, mask: Tensor | None, weights: LayerStepWeights, *, backend: str | None = None
) -> LayerStep:
    """Decode one token of each sequence: read the memory, write it, and compute the corrections of the projections.

    This is `memory_decode` on a copy of the state, and an `attention_correction` of zeros by each delta_weight. On a
    CPU it is one call into C++. There is no gradient, and `torch.compile` does not trace the call: compiled code calls
    the single operations.

    Args:
        x: `[B, D]`, or `[B, 1, D]`: the hidden states.
        state: `[B, H, R, R]`; None means zeros. It is not written.
        mask: `[B]`, or `[B, 1]` as x is, bool. A token that is False reads zeros and does not change its state.
        weights: the weights and options, which are those of `memory_decode` and `attention_correction`.
        backend: as in `delta_update`.

    Raises:
        TypeError, ValueError: an argument does not fit; nothing has run.
        BackendUnavailableError: the backend requested by name cannot run here.
    """
    results = eager.layer_step((x, state, mask, weights), backend)
    if results:
        return tuple.__new__(LayerStep, results)
    operands = LayerStepOperands(x, state, mask, weights)
    if results is None:
        operands.check()
        check_backend(backend)
    return _composed(operands, backend)


def _composed(o: LayerStepOperands, backend: str | None) -> LayerStep:
    w, batch, token = o.weights, o.x.shape[0], o.x.shape[1:-1]
    if o.state is None:
        rank = o.projection.rank
        dtype = torch.float64 if o.x.dtype == torch.float64 else torch.float32
        state = o.x.new_zeros((batch, w.heads, rank, rank), dtype=dtype)
    else:
        state = o.state.clone(memory_format=torch.contiguous_format)
    rows = None if o.mask is None else torch.arange(batch, device=o.x.device).masked_fill(~o.mask.reshape(batch), -1)
    qkv_weight: Any = tuple(w.qkv_weight) if len(w.qkv_weight) == 3 else w.qkv_weight[0]
    reads, _ = memory_decode(
        state, o.x, qkv_weight, w.beta_weight, w.beta_bias, w.decay_weight, w.decay_bias, heads=w.heads,
        normalize=w.normalize, mode=w.mode, state_indices=rows, backend=backend,
    )  # fmt: skip
    corrections = []
    for index, weight in enumerate(w.delta_weights):
        base = reads.new_zeros(()).expand(batch, *token, weight.shape[0])
        scale = w.gains[index] * w.scale if w.gains else w.scale
        norm_weight = w.norm_weight if index == len(w.delta_weights) - 1 else None
        corrections.append(
            attention_correction(
                base, reads, weight, scale, norm_weight=norm_weight, norm_eps=w.norm_eps, backend=backend
            )
        )
    return LayerStep(reads, state, tuple(corrections))
