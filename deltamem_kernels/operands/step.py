"""Operands of a decoding step on a pool of states."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import (
    check_bool,
    check_device,
    check_float,
    check_indices,
    check_int,
    check_mode,
    check_rank,
    check_tensor,
    describe,
    fail,
    requires_grad,
)
from .overlap import check_writable
from .types import Written, accumulation_dtype


class StepOperands(NamedTuple):
    """`delta_step`'s arguments, with `out` allocated."""

    state: Written
    """The pool, `[slots, H, R, R]`."""
    q: Tensor
    """`[N, H, R]`, or `[N, T, H, R]`, as are k and v. A gate per head has one dimension less."""
    k: Tensor
    v: Tensor
    beta: Tensor
    decay: Tensor | None
    state_indices: Tensor | None
    """`[N]`, or `[N, T]` for a slot per token."""
    num_accepted_tokens: Tensor | None
    """`[N]`."""
    intermediate_states: Written | None
    """`[N, T, H, R, R]`, or `[N, H, R, R]`."""
    out: Written
    """Gets the reads, of q's shape."""
    mode: str
    pad_slot_id: int
    update_state: bool

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic."""
        return accumulation_dtype(self.state, self.q, self.k, self.v, self.beta, self.decay)

    @property
    def written(self) -> list[Tensor]:
        return [x for x in (self.state, self.out, self.intermediate_states) if x is not None]

    def check(self) -> None:
        """Raise TypeError or ValueError if an argument does not fit."""
        q, state, intermediate = self.q, self.state, self.intermediate_states
        check_float("q", q, "[N, H, R] or [N, T, H, R]")
        if q.ndim not in (3, 4):
            fail(ValueError, "q", "[N, H, R] or [N, T, H, R]", q)
        check_rank("q", q)
        *leading, heads, rank = shape = tuple(q.shape)
        like = ("q", q)
        check_tensor("k", self.k, (shape,), "of q's shape", like)
        check_tensor("v", self.v, (shape,), "of q's shape", like)
        check_tensor("out", self.out, (shape,), "of q's shape", like)
        check_mode(self.mode, self.decay)
        check_tensor("beta", self.beta, (shape, shape[:-1]), "[N, (T,) H, R] or [N, (T,) H]", like)
        if self.decay is not None:
            check_tensor("decay", self.decay, (shape, shape[:-1]), "[N, (T,) H, R] or [N, (T,) H]", like)
        check_pool(state, (heads, rank, rank), like)
        if intermediate is not None:
            states = (*leading, heads, rank, rank)
            check_tensor("intermediate_states", intermediate, (states,), "[N, (T,) H, R, R]", like)
        if requires_grad(self):
            raise ValueError("delta_step has no gradient: call it under torch.no_grad(), or delta_update for training")
        self._check_slots()
        check_int("pad_slot_id", self.pad_slot_id)
        check_bool("update_state", self.update_state)
        read = {"q": q, "k": self.k, "v": self.v, "beta": self.beta, "decay": self.decay}
        if self.update_state:
            check_writable("state", state, read)
        if intermediate is not None:
            check_writable("intermediate_states", intermediate, read)
        check_writable("out", self.out, {**read, "state": state, "intermediate_states": intermediate})

    def _check_slots(self) -> None:
        rows, tokens = self.q.shape[0], self.q.shape[1] if self.q.ndim == 4 else 1
        indices, accepted = self.state_indices, self.num_accepted_tokens
        check_enough_slots(self.state, indices, rows)
        if indices is not None:
            check_indices("state_indices", indices, ((rows,), (rows, tokens)), "[N] or [N, T]", ("q", self.q))
        if accepted is not None:
            check_indices("num_accepted_tokens", accepted, ((rows,),), "[N]", ("q", self.q))
            if indices is None or indices.ndim != 2:
                raise ValueError(
                    "num_accepted_tokens needs state_indices [N, T], a slot for each drafted token, got "
                    + ("None" if indices is None else describe(indices))
                )


def check_pool(state: object, of_a_slot: tuple[int, ...], like: tuple[str, Tensor]) -> None:
    """Check that state is a pool `[slots, H, R, R]` on the device of the operand `like`."""
    check_float("state", state, "[slots, H, R, R]")
    assert isinstance(state, Tensor)
    if state.ndim != 4 or state.shape[1:] != of_a_slot:
        fail(ValueError, "state", f"[slots, H, R, R] = [slots, {', '.join(map(str, of_a_slot))}]", state)
    check_device("state", state, like[1].device, like[0])


def check_enough_slots(state: Tensor, state_indices: object, rows: int) -> None:
    """Check that row n can use slot n where there are no state_indices."""
    if state_indices is None and state.shape[0] < rows:
        raise ValueError(f"state must have a slot for each of the N={rows} rows, got {describe(state)}")
