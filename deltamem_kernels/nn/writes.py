"""What the tokens of a call write, and the scan over it; also for rows that hold several sequences."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from ..backends.reference.scan import gates
from ..operands import ScanOperands
from ..ops.delta_update import DeltaUpdateOutput, delta_update, run_scan


class Writes(NamedTuple):
    """What the tokens of a call wrote, so that the first of them can be written again."""

    k: Tensor
    v: Tensor
    beta: Tensor
    decay: Tensor | None
    mask: Tensor | None
    mode: str
    starts: Tensor | None = None

    def first(self, tokens: int) -> Writes:
        """Return what the first tokens wrote."""
        return Writes._make(x[:, :tokens] if isinstance(x, Tensor) else x for x in self)

    def onto(self, state: Tensor | None) -> Tensor:
        """Return the state after writing onto `state`; None means zeros."""
        return self.scan(self.k, state).final_state

    def scan(self, q: Tensor, state: Tensor | None) -> DeltaUpdateOutput:
        """Return what each token reads before it writes, and the final state."""
        k, v, beta, decay, mask, mode, starts = self
        if starts is None:
            return delta_update(q, k, v, beta, decay, mode=mode, initial_state=state, mask=mask)
        # The first token of a sequence reads zeros, keeps nothing and erases nothing. The shapes do not depend on the
        # number of sequences, which is therefore never read back from a GPU.
        begins = beginnings(starts, mask)
        keep, erase, write = gates(mode, beta, decay, None)
        erase, keep = (x.masked_fill(begins.view(*begins.shape, *(1,) * (x.ndim - 2)), 0) for x in (erase, keep))
        q = q.masked_fill(begins[:, :, None, None], 0)
        return run_scan(ScanOperands(q, k, v, erase, keep, write, state, mask, None, "affine"))


def beginnings(starts: Tensor, mask: Tensor | None) -> Tensor:
    """Return `[B, T]` bool: the first unmasked token of each sequence, except of a row's first sequence, which
    continues from the row's state."""
    if mask is None:
        return F.pad(starts[:, 1:], (1, 0))
    sequence = starts.cumsum(1)
    latest = sequence.masked_fill(~mask, -1).cummax(1).values
    before = F.pad(latest[:, :-1], (1, 0), value=-1)
    return mask & (before >= 0) & (sequence > before)
