"""What the tokens of a call write, and the scan over it; also where several sequences share a row."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from ..backends.reference import gates
from ..ops.delta_update import DeltaUpdateOutput, delta_update, run


class Writes(NamedTuple):
    """What the tokens of a call wrote, enough to write the first of them again."""

    k: Tensor
    v: Tensor
    beta: Tensor
    decay: Tensor | None
    mask: Tensor | None
    mode: str
    starts: Tensor | None = None

    def first(self, tokens: int) -> Writes:
        """What the first tokens wrote."""
        return Writes._make(x[:, :tokens] if isinstance(x, Tensor) else x for x in self)

    def onto(self, state: Tensor | None) -> Tensor:
        """The state that they leave; None stands for zeros."""
        return self.scan(self.k, state).final_state

    def scan(self, q: Tensor, state: Tensor | None) -> DeltaUpdateOutput:
        """What each token reads before it writes, and the state behind."""
        k, v, beta, decay, mask, mode, starts = self
        if starts is None:
            return delta_update(q, k, v, beta, decay, mode=mode, initial_state=state, mask=mask)
        # A token that begins anew reads nothing, and keeps and erases nothing of what is there before it: so the shapes
        # do not depend on how many sequences there are, and nobody has to know on a GPU.
        begins = beginnings(starts, mask)
        keep, erase, write = gates(mode, beta, decay, None)
        erase, keep = (x.masked_fill(begins.view(*begins.shape, *(1,) * (x.ndim - 2)), 0) for x in (erase, keep))
        q = q.masked_fill(begins[:, :, None, None], 0)
        return DeltaUpdateOutput(*run(q, k, v, erase, keep, write, state, mask, None, mode="affine", backend=None))


def beginnings(starts: Tensor, mask: Tensor | None) -> Tensor:
    """`[B, T]` bool: the first token that counts of each sequence but a row's first, which goes on from its state."""
    if mask is None:
        return F.pad(starts[:, 1:], (1, 0))
    sequence = starts.cumsum(1)
    latest = sequence.masked_fill(~mask, -1).cummax(1).values
    before = F.pad(latest[:, :-1], (1, 0), value=-1)
    return mask & (before >= 0) & (sequence > before)
