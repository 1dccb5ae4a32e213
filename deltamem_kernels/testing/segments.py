"""Random problems for `segment_mean`."""

from __future__ import annotations

import torch

from ..ops.segment_mean import segment_mean
from .problem import Dtypes, Problem, finish


def segment_problem(
    B: int,
    T: int,
    D: int,
    M: int,
    *,
    rising: bool = False,
    mask: bool = False,
    index_dtype: torch.dtype = torch.int64,
    dtype: Dtypes = torch.float32,
    fenced: bool = False,
    device: str | torch.device = "cpu",
) -> Problem:
    """Return a random call of `segment_mean`. Some tokens belong to no segment, and the last of several segments is
    empty.

    Args:
        B, T, D, M: the sizes; M is the number of segments.
        rising: the ids rise along a row.
        mask: whether there is a mask. About six tokens of ten count.
        index_dtype: of the ids.
        dtype: of x.
        fenced: put x between NaN, and give ids and mask other strides. Ids lie between others that would count.
        device: of all tensors.
    """
    ids = torch.randint(-2, max(M - 1, 1), (B, T)).clamp(max=M - 1)
    ids = ids.sort(dim=1).values if rising else ids
    ids = ids.to(device, index_dtype)
    if fenced:
        wide = torch.full((T + 3, 2 * B), M - 1, dtype=index_dtype, device=device)
        ids = wide.t()[::2, 2:-1].copy_(ids)
    options: dict = {"segment_ids": ids, "num_segments": M}
    if mask:
        chosen = (torch.rand(B, T) < 0.6).to(device)
        options["mask"] = chosen.t().contiguous().t() if fenced else chosen
    return Problem(segment_mean, finish({"x": torch.randn(B, T, D)}, dtype, device, fenced), options)
