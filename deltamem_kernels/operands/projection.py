"""Operands of the projection from hidden states to the memory's q, k, v and gates, alone and followed by a scan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import (
    MAX_RANK,
    check_bool,
    check_cu_seqlens,
    check_device,
    check_float,
    check_int,
    check_mask,
    check_mode,
    check_tensor,
    fail,
    is_dense_float,
)
from .scan import ScanOperands
from .types import accumulation_dtype

QkvWeight = Tensor | tuple[Tensor, Tensor, Tensor]
"""The weights of q, k and v: one tensor `[3·H·R, D]`, or three `[H·R, D]`."""


def qkv_parts(qkv_weight: object) -> Sequence[Tensor]:
    """Return the weights as a sequence of one tensor or three, as the records hold them.

    Raises:
        ValueError: a tuple that does not hold three.
    """
    if not isinstance(qkv_weight, tuple):
        return (qkv_weight,)  # type: ignore[return-value]
    if len(qkv_weight) != 3:
        raise ValueError(f"qkv_weight must be one tensor [3·H·R, D] or three [H·R, D], got {len(qkv_weight)} tensors")
    return qkv_weight


class ProjectionOperands(NamedTuple):
    """`memory_projection`'s arguments."""

    x: Tensor
    """`[B, T, D]`, or `[N, D]`."""
    qkv_weight: Sequence[Tensor]
    """One tensor `[3·H·R, D]`, or three `[H·R, D]`."""
    beta_weight: Tensor
    """`[H·R, D]`, or `[H, D]` for one gate per head; likewise decay_weight."""
    beta_bias: Tensor | None
    decay_weight: Tensor | None
    decay_bias: Tensor | None
    heads: int
    normalize: bool

    @property
    def weights(self) -> list[Tensor]:
        """The weights that are there, in the order of the rows of the projection: q, k, v, beta, decay."""
        gates = [self.beta_weight] if self.decay_weight is None else [self.beta_weight, self.decay_weight]
        return [*self.qkv_weight, *gates]

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.x, *self.qkv_weight, self.beta_weight, self.beta_bias, self.decay_weight, self.decay_bias)

    @property
    def width(self) -> int:
        """H·R, the rows of q's weight."""
        return sum(weight.shape[0] for weight in self.qkv_weight) // 3

    @property
    def rank(self) -> int:
        return self.width // self.heads

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic and of the results."""
        return accumulation_dtype(*self.tensors)

    def gate_shape(self, weight: Tensor | None) -> tuple[int, ...]:
        """The shape of a projected gate; `(0,)` where there is no weight."""
        if weight is None:
            return (0,)
        tokens = self.x.shape[:-1]
        per_row = weight.shape[0] == self.width
        return (*tokens, self.heads, self.rank) if per_row else (*tokens, self.heads)

    def empty_results(self) -> Projected:
        """Allocate the results."""
        tokens, heads, rank = self.x.shape[:-1], self.heads, self.rank
        rows = (*tokens, heads, rank)
        gates = [self.gate_shape(self.beta_weight), self.gate_shape(self.decay_weight)]
        norms = (2, *tokens, heads) if self.normalize else (0,)
        dtype = self.dtype
        return Projected(*(self.x.new_empty(shape, dtype=dtype) for shape in (rows, rows, rows, *gates, norms)))

    def check(self) -> None:
        """Raise TypeError or ValueError if an argument does not fit."""
        x, _, beta_weight, beta_bias, decay_weight, decay_bias, heads, normalize = self
        check_float("x", x, "[B, T, D] or [N, D]")
        if x.ndim not in (2, 3):
            fail(ValueError, "x", "[B, T, D] or [N, D]", x)
        check_int("heads", heads, "an int, the number of heads H")
        if heads < 1:
            raise ValueError(f"heads must be at least 1, got {heads}")
        check_bool("normalize", normalize)
        self._check_qkv()
        rows = self.width
        _check_gate("beta", beta_weight, beta_bias, rows, heads, x)
        if decay_weight is not None:
            _check_gate("decay", decay_weight, decay_bias, rows, heads, x)
        elif decay_bias is not None:
            fail(ValueError, "decay_bias", "None without a decay_weight", decay_bias)

    def _check_qkv(self) -> None:
        x, parts, heads = self.x, self.qkv_weight, self.heads
        for part in parts:
            check_float("qkv_weight", part, "[3·H·R, D], or three [H·R, D]")
        shape = "[3·H·R, D]" if len(parts) == 1 else "[H·R, D]"
        of_rows = heads * 3 // len(parts)
        for part in parts:
            if part.ndim != 2 or part.shape[1] != x.shape[-1]:
                fail(ValueError, "qkv_weight", f"{shape} with x's D={x.shape[-1]}", part)
            if part.shape[0] % of_rows or not 1 <= part.shape[0] // of_rows <= MAX_RANK:
                fail(ValueError, "qkv_weight", f"{shape} with H={heads} and R from 1 to {MAX_RANK}", part)
            if part.shape != parts[0].shape:
                fail(ValueError, "qkv_weight", f"three tensors of one shape {list(parts[0].shape)}", part)
            check_device("qkv_weight", part, x.device, "x")


def _check_gate(name: str, weight: object, bias: object, rows: int, heads: int, x: Tensor) -> None:
    width = x.shape[-1]
    if not is_dense_float(weight, (rows, width), x.device):
        shapes = ((rows, width), (heads, width))
        check_tensor(f"{name}_weight", weight, shapes, "[H·R, D] or [H, D]", ("x", x))
    assert isinstance(weight, Tensor)
    if bias is not None:
        shape = (weight.shape[0],)
        check_tensor(f"{name}_bias", bias, (shape,), f"of as many numbers as {name}_weight has rows", ("x", x))


class Projected(NamedTuple):
    """What a projection returns, in the dtype of the arithmetic."""

    q: Tensor
    """`[B, T, H, R]` (`[N, H, R]`), as are k and v."""
    k: Tensor
    v: Tensor
    beta: Tensor
    """`[B, T, H, R]`, or `[B, T, H]`; likewise decay, which is empty where it is not projected."""
    decay: Tensor
    norms: Tensor
    """`[2, B, T, H]`, the norms of tanh(Wq x) and tanh(Wk x); empty without `normalize`."""


class ProjectionAdjoint(NamedTuple):
    """What the backward of a projection is given: the gradients of its results, its operands and its results."""

    d_q: Tensor | None
    d_k: Tensor | None
    d_v: Tensor | None
    d_beta: Tensor | None
    d_decay: Tensor | None
    x: Tensor | None
    """Read only for the gradients of the weights; None where no weight needs one."""
    qkv_weight: Sequence[Tensor]
    beta_weight: Tensor
    beta_bias: Tensor | None
    decay_weight: Tensor | None
    decay_bias: Tensor | None
    q: Tensor
    k: Tensor
    beta: Tensor
    decay: Tensor
    norms: Tensor
    x_dtype: torch.dtype

    @property
    def weights(self) -> list[Tensor]:
        """The weights that are there, in the order of the rows of the projection: q, k, v, beta, decay."""
        gates = [self.beta_weight] if self.decay_weight is None else [self.beta_weight, self.decay_weight]
        return [*self.qkv_weight, *gates]

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """Weights and biases, in the order in which backward returns their gradients, after that of x."""
        return (self.beta_weight, self.beta_bias, self.decay_weight, self.decay_bias, *self.qkv_weight)


class PrefillOperands(NamedTuple):
    """`memory_prefill`'s arguments: a projection, and what the scan needs besides."""

    x: Tensor
    qkv_weight: Sequence[Tensor]
    beta_weight: Tensor
    beta_bias: Tensor | None
    decay_weight: Tensor | None
    decay_bias: Tensor | None
    initial_state: Tensor | None
    mask: Tensor | None
    cu_seqlens: Tensor | None
    heads: int
    normalize: bool
    mode: str

    @property
    def projection(self) -> ProjectionOperands:
        return ProjectionOperands(*self[:6], self.heads, self.normalize)

    def scan(self, projected: Projected) -> ScanOperands:
        """The operands of the scan that follows the projection."""
        q, k, v, beta, decay, _ = projected
        given_decay = None if self.decay_weight is None else decay
        return ScanOperands(q, k, v, beta, given_decay, None, self.initial_state, self.mask, self.cu_seqlens, self.mode)

    def check(self) -> None:
        """Raise TypeError or ValueError if an argument does not fit."""
        self.projection.check()
        x, state = self.x, self.initial_state
        if x.ndim != 3:
            fail(ValueError, "x", "[B, T, D]", x)
        check_mode(self.mode, self.decay_weight, "decay_weight")
        if self.cu_seqlens is not None:
            check_cu_seqlens(self.cu_seqlens, x.shape[0], ("x", x))
        if self.mask is not None:
            check_mask(self.mask, (x.shape[0], x.shape[1]), ("x", x))
        if state is not None:
            rank = self.projection.rank
            sequences = x.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1
            shape = (sequences, self.heads, rank, rank)
            check_tensor("initial_state", state, (shape,), "[N, H, R, R]", ("x", x))
