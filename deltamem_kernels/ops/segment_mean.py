"""`segment_mean`: the mean of the tokens of each segment, a message or a sentence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import choose
from ..operands import SegmentOperands
from ..operands.checks import check_backend, requires_grad
from .differentiation import first_order, refuse_tangents
from .operators import arguments, check_fake, define


class SegmentMean(NamedTuple):
    """What `segment_mean` returns."""

    means: Tensor
    """`[B, M, D]` in x's dtype; zeros for a segment without tokens."""
    written: Tensor
    """`[B, M]` bool: the segments that got at least one token."""


def segment_mean(
    x: Tensor,
    segment_ids: Tensor,
    num_segments: int,
    mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> SegmentMean:
    """Average the hidden states of each segment, as δ-mem's SSW strategy writes them: once per message or sentence.

    There is no loop on the host and no synchronisation with the GPU. The order of additions is fixed, so that results
    are bitwise deterministic.

    Args:
        x: `[B, T, D]`, float16, bfloat16, float32 or float64, any strides.
        segment_ids: `[B, T]` int32 or int64, in any order: the segment of each token, counted within its row of the
            batch. A token with a negative id belongs to no segment. On the CPU an id of num_segments or more is an
            error. On a GPU, where values are not read back, such a token belongs to no segment.
        num_segments: M. 0 is allowed.
        mask: `[B, T]` bool. A token that is False belongs to no segment, whatever its id.
        backend: as in `delta_update`.

    Returns:
        SegmentMean: means and written. Sums are float32 (float64 for float64), rounded once to x's dtype. A token that
        belongs to no segment does not affect any result, even if it holds NaN.

    First-order gradients for x. Backward keeps the ids, the mask and a count per segment.

    Raises:
        TypeError, ValueError: an argument does not fit.
        NotImplementedError: an operand carries a tangent of forward-mode differentiation.
        BackendUnavailableError: the backend requested by name cannot run here.
    """
    operands = SegmentOperands(x, segment_ids, num_segments, mask)
    operands.check()
    check_backend(backend)
    refuse_tangents("segment_mean", operands)
    run = _SegmentMean.apply if requires_grad(operands) else torch.ops.deltamem_kernels.segment_mean
    means, counts = run(*operands, backend or "")
    return SegmentMean(means, counts > 0)


def _forward(*fields):
    *fields, backend = fields
    operands = SegmentOperands(*fields)
    return choose(backend, operands.x.device).segment_mean(operands)


def _backward(d_means, segment_ids, counts, mask, backend):
    return choose(backend, d_means.device).segment_mean_backward(d_means, segment_ids, counts, mask)


def _forward_fake(x, segment_ids, num_segments, mask, backend):
    check_fake(backend, x)
    shape = (x.shape[0], num_segments)
    return x.new_empty((*shape, x.shape[2])), x.new_empty(shape, dtype=torch.int32)


def _backward_fake(d_means, segment_ids, counts, mask, backend):
    return d_means.new_empty((*segment_ids.shape, d_means.shape[2]))


define(
    "segment_mean",
    f"({arguments(SegmentOperands)}, str backend) -> (Tensor means, Tensor counts)",
    _forward,
    _forward_fake,
)
define(
    "segment_mean_backward",
    "(Tensor d_means, Tensor segment_ids, Tensor counts, Tensor? mask, str backend) -> Tensor",
    _backward,
    _backward_fake,
)


class _SegmentMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, segment_ids, num_segments, mask, backend):
        means, counts = torch.ops.deltamem_kernels.segment_mean(x, segment_ids, num_segments, mask, backend)
        ctx.save_for_backward(segment_ids, counts, mask)
        ctx.backend = backend
        ctx.mark_non_differentiable(counts)
        return means, counts

    @staticmethod
    @first_order("segment_mean")
    def backward(ctx, saved, d_means, _):
        segment_ids, counts, mask = saved
        d_x = torch.ops.deltamem_kernels.segment_mean_backward(d_means, segment_ids, counts, mask, ctx.backend)
        return d_x, *(None,) * 4
