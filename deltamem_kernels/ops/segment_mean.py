"""`segment_mean`: the mean of the tokens of each segment, a message or a sentence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import choose
from ._checks import INDICES, check_backend, check_float, check_shape, fail
from ._library import define, library


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
    """Means over segments of tokens, as δ-mem's SSW strategy writes them: once for each message or sentence.

    There is no loop on the host and no synchronisation with the GPU, and the order of additions is fixed: the same
    bits on every run.

    Args:
        x: `[B, T, D]`, float16, bfloat16, float32 or float64, any strides.
        segment_ids: `[B, T]` int32 or int64, in any order: the segment of each token, counted within its row of the
            batch. A token with a negative id belongs to none. An id from num_segments on is an error on the CPU; on a
            GPU, where values are not read back, such a token belongs to none.
        num_segments: M. 0 is allowed.
        mask: `[B, T]` bool. A token that is False belongs to no segment, whatever its id.
        backend: as in `delta_update`.

    Returns:
        SegmentMean: means and written. Sums are float32 (float64 for float64), rounded once to x's dtype. What stands
        in a token that belongs to no segment, NaN too, reaches no result. Differentiable once in x; backward keeps the
        ids, the mask and a count for each segment.

    Raises:
        TypeError, ValueError: an argument that does not fit.
        BackendUnavailableError: the backend asked for by name cannot run here; the message says why.
    """
    check(x, segment_ids, num_segments, mask)
    if backend is not None:
        check_backend(backend)
    if torch.is_grad_enabled() and x.requires_grad:
        means, counts = _SegmentMean.apply(x, segment_ids, num_segments, mask, backend or "")
    else:
        means, counts = torch.ops.deltamem_kernels.segment_mean(x, segment_ids, num_segments, mask, backend or "")
    return SegmentMean(means, counts > 0)


def check(x, segment_ids, num_segments, mask) -> None:
    check_float("x", x, "[B, T, D]")
    if x.ndim != 3:
        fail(ValueError, "x", "[B, T, D]", x)
    tokens = tuple(x.shape[:2])
    for name, y, dtypes, wanted in (
        ("segment_ids", segment_ids, INDICES, "an int32 or int64 tensor [B, T]"),
        ("mask", mask, (torch.bool,), "a bool tensor [B, T], True where a token counts"),
    ):
        if y is None and name == "mask":
            continue
        if not isinstance(y, Tensor) or y.dtype not in dtypes or y.layout is not torch.strided:
            fail(TypeError, name, wanted, y)
        check_shape(name, y, [tokens], "[B, T]")
        if y.device != x.device:
            fail(ValueError, name, f"on x's device {x.device}", y)
    if not isinstance(num_segments, (int, torch.SymInt)) or isinstance(num_segments, bool):
        fail(TypeError, "num_segments", "an int, the number of segments M", num_segments)
    if num_segments < 0:
        raise ValueError(f"num_segments must be 0 or more, got {num_segments}")


define(
    "segment_mean(Tensor x, Tensor segment_ids, SymInt num_segments, Tensor? mask, str backend) "
    "-> (Tensor means, Tensor counts)"
)
define("segment_mean_backward(Tensor d_means, Tensor segment_ids, Tensor counts, Tensor? mask, str backend) -> Tensor")


def _forward(x, segment_ids, num_segments, mask, backend):
    return choose(backend, x.device).segment_mean_forward(x, segment_ids, num_segments, mask)


def _backward(d_means, segment_ids, counts, mask, backend):
    return choose(backend, d_means.device).segment_mean_backward(d_means, segment_ids, counts, mask)


def _forward_fake(x, segment_ids, num_segments, mask, backend):
    if x.device.type == "meta":  # no kernel will run, a backend that could not is refused all the same
        choose(backend, x.device)
    shape = (x.shape[0], num_segments)
    return x.new_empty((*shape, x.shape[2])), x.new_empty(shape, dtype=torch.int32)


def _backward_fake(d_means, segment_ids, counts, mask, backend):
    return d_means.new_empty((*segment_ids.shape, d_means.shape[2]))


class _SegmentMean(torch.autograd.Function):
    """Around the operator and not registered with it: a call that needs no gradient then skips autograd."""

    @staticmethod
    def forward(ctx, x, segment_ids, num_segments, mask, backend):
        means, counts = torch.ops.deltamem_kernels.segment_mean(x, segment_ids, num_segments, mask, backend)
        ctx.save_for_backward(segment_ids, counts, mask)
        ctx.backend = backend
        ctx.mark_non_differentiable(counts)
        return means, counts

    @staticmethod
    @once_differentiable
    def backward(ctx, d_means, _):
        segment_ids, counts, mask = ctx.saved_tensors
        d_x = torch.ops.deltamem_kernels.segment_mean_backward(d_means, segment_ids, counts, mask, ctx.backend)
        return d_x, *(None,) * 4


library.impl("segment_mean", _forward, "CompositeExplicitAutograd")
library.impl("segment_mean_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("deltamem_kernels::segment_mean", _forward_fake, lib=library)
torch.library.register_fake("deltamem_kernels::segment_mean_backward", _backward_fake, lib=library)
