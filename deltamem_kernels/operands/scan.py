"""Operands of a scan: the delta rule over whole sequences."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import (
    check_cu_seqlens,
    check_float,
    check_mask,
    check_mode,
    check_rank,
    check_tensor,
    fail,
)
from .types import accumulation_dtype

CHECKPOINT_INTERVAL = 64
"""Backward keeps the state before every 64th token of a sequence and recomputes the states in between."""


class ScanOperands(NamedTuple):
    """`delta_update`'s arguments. `check` also accepts the layout without H; everything else expects H."""

    q: Tensor
    """`[B, T, H, R]`, as are k and v."""
    k: Tensor
    v: Tensor
    beta: Tensor
    """`[B, T, H, R]`, or `[B, T, H]` for one gate per head; likewise decay and write."""
    decay: Tensor | None
    write: Tensor | None
    """Only in mode "affine", where the gates are given separately: beta is erase, decay is keep."""
    initial_state: Tensor | None
    """`[N, H, R, R]`, or None for zeros."""
    mask: Tensor | None
    """`[B, T]` bool."""
    cu_seqlens: Tensor | None
    """`[N + 1]`."""
    mode: str

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """The operands that have a gradient, in the order in which backward returns the gradients."""
        return self[:7]

    @property
    def num_sequences(self) -> int:
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic and of the state."""
        return accumulation_dtype(*self.differentiable)

    @property
    def checkpoints_shape(self) -> tuple[int, ...]:
        B, T, H, R = self.q.shape
        return B, T // CHECKPOINT_INTERVAL, H, R, R

    def check(self) -> None:
        """Raise TypeError or ValueError if an argument does not fit."""
        q, k, v, beta, decay, _, initial_state, mask, cu_seqlens, mode = self
        check_float("q", q, "[B, T, H, R] or [B, T, R]")
        if q.ndim not in (3, 4):
            fail(ValueError, "q", "[B, T, H, R] or [B, T, R]", q)
        check_rank("q", q)
        no_heads = q.ndim == 3
        batch, tokens, rank, heads = q.shape[0], q.shape[1], q.shape[-1], 1 if no_heads else q.shape[2]
        if heads < 1:
            fail(ValueError, "q", "of at least one head, [B, T, H, R]", q)
        like = ("q", q)
        check_tensor("k", k, (tuple(q.shape),), "of q's shape", like)
        check_tensor("v", v, (tuple(q.shape),), "of q's shape", like)
        check_mode(mode, decay)
        gate_shapes = [(batch, tokens, heads, rank), (batch, tokens, heads)]
        gate_shapes += [(batch, tokens, rank), (batch, tokens)] * no_heads
        for name, gate in (("beta", beta), ("decay", decay)):
            if name == "beta" or gate is not None:
                check_tensor(name, gate, gate_shapes, "[B, T, H, R] or [B, T, H]", like)
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, batch, like)
        if initial_state is not None:
            states = self.num_sequences
            state_shapes = [(states, heads, rank, rank)] + [(states, rank, rank)] * no_heads
            check_tensor("initial_state", initial_state, state_shapes, "[N, H, R, R]", like)
        if mask is not None:
            check_mask(mask, (batch, tokens), like)

    def with_heads(self) -> ScanOperands:
        """Insert H = 1 where the operands come without H. A gate `[B, T, 1]` is one per head already, which at R = 1
        means one per row as well."""
        q = self.q.unsqueeze(2)

        def gate(x: Tensor) -> Tensor:
            return x if x.ndim == 4 or (x.ndim == 3 and x.shape[2] == 1) else x.unsqueeze(2)

        state = self.initial_state
        return self._replace(
            q=q,
            k=self.k.unsqueeze(2),
            v=self.v.unsqueeze(2),
            beta=gate(self.beta),
            decay=None if self.decay is None else gate(self.decay),
            initial_state=state.unsqueeze(1) if state is not None and state.ndim == 3 else state,
        )


class ScanResult(NamedTuple):
    """What a scan returns."""

    reads: Tensor
    """`[B, T, H, R]` in q's dtype."""
    final_state: Tensor
    """`[N, H, R, R]` in the dtype of the arithmetic."""
    checkpoints: Tensor
    """`[B, T // 64, H, R, R]` in the dtype of the arithmetic, or an empty tensor where backward is not wanted."""


class ScanCotangents(NamedTuple):
    """The gradients that a scan's backward starts from; None for a result that nothing depends on."""

    reads: Tensor | None
    final_state: Tensor | None
