"""Statistics of a memory: how much it writes and keeps, how large its states and its corrections are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...nn.memory import Gates


class LayerStatistics(NamedTuple):
    """Statistics of one layer in one call. Averages leave out padding. None if nothing was written."""

    beta: Tensor | None
    """`[B, T, H, R]` or `[B, T, H]` (messages or sentences in place of tokens where these write): β. Differentiable."""
    beta_mean: Tensor | None
    """The mean of β, a scalar. Differentiable, for example as a penalty on writing."""
    keep_mean: Tensor | None
    """The mean of what is kept of the state: λ, or 1 with `no_lambda`."""
    state_norm: Tensor
    """`[B, H]`: the Frobenius norm of each state after the call."""
    correction_ratio: dict[str, Tensor]
    """For each corrected head, the norm of the correction over the norm of the projection's output, a scalar."""


class Measurement:
    """The statistics of a running call."""

    def __init__(self, mask: Tensor | None) -> None:
        self.mask = mask
        self.ratios: dict[str, Tensor] = {}

    @torch.no_grad()
    def ratio(self, correction: Tensor, output: Tensor) -> Tensor:
        """Return the ratio of two norms over all tokens but padding."""
        if self.mask is not None:
            correction, output = (x * self.mask[:, :, None] for x in (correction, output))
        return correction.float().norm() / output.float().norm()

    def statistics(self, gates: Gates | None, state: Tensor) -> LayerStatistics:
        """Return the statistics of the call."""
        norm = torch.linalg.matrix_norm(state.detach())
        if gates is None:
            return LayerStatistics(None, None, None, norm, self.ratios)
        beta_mean, keep_mean = (_mean(x, gates.written) for x in (gates.beta, gates.keep))
        return LayerStatistics(gates.beta, beta_mean, keep_mean.detach(), norm, self.ratios)


def _mean(x: Tensor, written: Tensor | None) -> Tensor:
    if written is None:
        return x.mean()
    weight = written.view(*written.shape, *(1,) * (x.ndim - 2)).expand_as(x)
    return (x * weight).sum() / weight.sum().clamp_min(1)
