"""`segment_mean` in plain PyTorch: the oracle of its tests."""

from __future__ import annotations

import torch
from torch import Tensor

from ...operands import SegmentOperands
from ...operands.types import accumulation_dtype
from ..base import plain_torch


@plain_torch
def segment_mean(operands: SegmentOperands) -> tuple[Tensor, Tensor]:
    """See `Backend.segment_mean`."""
    x, segment_ids, num_segments, mask = operands
    B, _, D = x.shape
    writes = segment_ids >= 0 if mask is None else (segment_ids >= 0) & mask
    if x.device.type == "cpu" and (writes & (segment_ids >= num_segments)).any():
        wrong = int(segment_ids[writes].max())
        raise ValueError(f"segment_ids must be below num_segments={num_segments}, got {wrong}")
    at = _segments(segment_ids, num_segments, mask)
    counts = torch.zeros(B, num_segments + 1, dtype=torch.int32, device=x.device)
    counts.scatter_add_(1, at, torch.ones_like(at, dtype=torch.int32))
    sums = torch.zeros(B, num_segments + 1, D, dtype=accumulation_dtype(x), device=x.device)
    for t in range(x.shape[1]):  # in order, so that every device adds in the same order
        sums[torch.arange(B, device=x.device), at[:, t]] += x[:, t]
    counts = counts[:, :num_segments].contiguous()
    return (sums[:, :num_segments] / counts.clamp_min(1).unsqueeze(-1)).to(x.dtype), counts


@plain_torch
def segment_mean_backward(d_means: Tensor, segment_ids: Tensor, counts: Tensor, mask: Tensor | None) -> Tensor:
    """See `Backend.segment_mean_backward`."""
    B, M, D = d_means.shape
    dtype = accumulation_dtype(d_means)
    share = d_means.to(dtype) / counts.clamp_min(1).unsqueeze(-1)
    share = torch.cat([share, share.new_zeros(B, 1, D)], dim=1)
    at = _segments(segment_ids, M, mask)
    return share.gather(1, at.unsqueeze(-1).expand(*at.shape, D)).to(d_means.dtype)


def _segments(segment_ids: Tensor, num_segments: int, mask: Tensor | None) -> Tensor:
    """Return int64 ids; a token that belongs to no segment has the id num_segments, one past the last."""
    writes = (segment_ids >= 0) & (segment_ids < num_segments)
    if mask is not None:
        writes = writes & mask
    return torch.where(writes, segment_ids.long(), num_segments)
