"""The interface of a backend, with the defaults that are composed of other operations.

Operands arrive checked. A kernel records no gradient: the operators in `ops` do that.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..operands import (
    CorrectionOperands,
    DecodeOperands,
    PrefillOperands,
    Projected,
    ProjectionAdjoint,
    ProjectionOperands,
    ScanCotangents,
    ScanOperands,
    ScanResult,
    SegmentOperands,
    StepOperands,
)

Gradients = list[Tensor | None]
"""One per differentiable operand, in its shape and dtype; None where `needs` is False."""


class Decoded(NamedTuple):
    """What a decoding step returns."""

    reads: Tensor
    """`[N, H, R]`, or `[N, 1, H, R]`, in the dtype of the projection."""
    corrected: Tensor
    """The corrected base; empty where `out` holds it, or where nothing is corrected."""


class Backend(abc.ABC):
    """One way to run every operation.

    Backward methods take `needs`, a flag per differentiable operand, and return a list with the gradient where the flag
    is set and None elsewhere. A returned tensor is never one of the operands.
    """

    name: ClassVar[str]

    @abc.abstractmethod
    def unavailable_reason(self, device: torch.device) -> str | None:
        """Return why the backend cannot run on tensors of this device, as a sentence, or None if it can. It may still
        have to compile."""

    def load(self) -> None:  # noqa: B027 (most have nothing to load)
        """Load what the backend runs. The first call may compile.

        Raises:
            BuildError: it cannot be compiled or loaded.
        """

    @abc.abstractmethod
    def scan(self, operands: ScanOperands, save: bool) -> ScanResult:
        """Run the delta rule over sequences; with `save`, keep the checkpoints that backward needs."""

    @abc.abstractmethod
    def scan_backward(
        self, operands: ScanOperands, checkpoints: Tensor, cotangents: ScanCotangents, needs: list[bool]
    ) -> Gradients:
        """Return the gradients of `operands.differentiable`."""

    @abc.abstractmethod
    def step(self, operands: StepOperands) -> None:
        """Decode: write the reads into `out`, and the states into the pool and into intermediate_states."""

    @abc.abstractmethod
    def correct(self, operands: CorrectionOperands, out: Tensor | None) -> Tensor:
        """Correct base into out, which may be base itself, or into a new contiguous tensor."""

    @abc.abstractmethod
    def correct_backward(self, operands: CorrectionOperands, d_out: Tensor, needs: list[bool]) -> Gradients:
        """Return the gradients of `operands.differentiable`. base is None unless there is a norm over heads. Without
        head_dim the gradient of base is d_out, and is never asked for."""

    @abc.abstractmethod
    def project(self, operands: ProjectionOperands) -> Projected:
        """Project hidden states to q, k, v and the gates."""

    @abc.abstractmethod
    def project_backward(self, adjoint: ProjectionAdjoint, needs: list[bool]) -> Gradients:
        """Return the gradients of x and of `adjoint.parameters`."""

    @abc.abstractmethod
    def segment_mean(self, operands: SegmentOperands) -> tuple[Tensor, Tensor]:
        """Return the means `[B, M, D]` in x's dtype, and the number of tokens of each segment, `[B, M]` int32."""

    @abc.abstractmethod
    def segment_mean_backward(
        self, d_means: Tensor, segment_ids: Tensor, counts: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Return the gradient of x, `[B, T, D]` in d_means' dtype."""

    def prefill(self, operands: PrefillOperands, save: bool) -> tuple[Projected, ScanResult]:
        """Project hidden states, then scan."""
        projected = self.project(operands.projection)
        return projected, self.scan(operands.scan(projected), save)

    def decode(self, operands: DecodeOperands) -> Decoded:
        """Project one token of each request, step the pool in place, and correct base if there is one."""
        projected = self.project(operands.projection)
        reads = torch.empty_like(projected.q)
        self.step(operands.step(projected, reads))
        nothing = operands.x.new_empty((0,))
        if operands.delta_weight is None:
            return Decoded(reads, nothing)
        corrected = self.correct(operands.correction(reads), operands.out)
        return Decoded(reads, corrected if operands.out is None else nothing)


def plain_torch(function: Callable) -> Callable:
    """Make a function in plain PyTorch behave as a kernel: it records no gradient and ignores autocast."""

    @functools.wraps(function)
    def run(*arguments):
        device = next(x.device.type for x in _tensors(arguments))
        autocast = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
        with torch.no_grad(), autocast:
            return function(*arguments)

    return run


def _tensors(arguments: tuple):
    """The tensors among the arguments and in their records."""
    for x in arguments:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, tuple):
            yield from _tensors(x)
