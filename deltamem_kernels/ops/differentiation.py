"""Differentiation beyond first-order gradients: it raises instead of losing terms."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from .operators import define, library

Gradients = tuple[Tensor | None, ...]


def refuse_tangents(operation: str, operands: Sequence[object], instead: str | None = None) -> None:
    """Raise NotImplementedError if an operand, or a tensor in a sequence of operands, carries a tangent of forward-mode
    differentiation. The operators have none, so that the tangents of their results would be lost.

    Args:
        operation: its name, for the message.
        operands: tensors, sequences of tensors, and others, which are ignored.
        instead: what to use; None means gradients in reverse mode.
    """
    if forward_ad._current_level < 0:  # no tangents anywhere
        return
    instead = instead or "use first-order gradients in reverse mode, torch.autograd.grad or backward()"
    message = (
        f"{operation} does not support forward-mode differentiation (torch.autograd.forward_ad, torch.func.jvp, jacfwd "
        f"or hessian), and an operand carries a tangent: {instead}"
    )
    for x in operands:
        if isinstance(x, (tuple, list)):
            refuse_tangents(operation, x, instead)
        elif isinstance(x, Tensor) and x.is_floating_point():
            torch.ops.deltamem_kernels.refuse_tangent(x, message)


def _refuse_tangent(keys: torch._C.DispatchKeySet, x: Tensor, message: str) -> Tensor:
    if forward_ad.unpack_dual(x).tangent is not None:
        raise NotImplementedError(message)
    return torch.ops.deltamem_kernels.refuse_tangent.default.redispatch(
        keys & torch._C._after_autograd_keyset, x, message
    )


def _nothing(x: Tensor, message: str) -> Tensor:
    return x.new_empty((0,))


# An operator, because nested transforms of torch.func hide each other's tangents, and the dispatcher goes through all.
define("refuse_tangent", "(Tensor x, str message) -> Tensor", _nothing, _nothing)
library.impl("refuse_tangent", _refuse_tangent, "Autograd", with_keyset=True)


def first_order(operation: str) -> Callable[[Callable[..., Gradients]], Callable[..., Gradients]]:
    """Decorate the `backward(ctx, saved, *d_results)` of an autograd.Function, where `saved` are its saved tensors.

    The gradients are computed without recording. Under `create_graph=True` they are connected with all that they depend
    on by a node that raises when they are differentiated. torch's `once_differentiable` connects them with `d_results`
    alone: of the second derivative, what goes through the saved tensors is lost silently.
    """

    def decorate(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
        @functools.wraps(backward)
        def run(ctx: Any, *d_results: Tensor | None) -> Gradients:
            saved = ctx.saved_tensors  # once: a checkpointed tensor can be unpacked once
            with torch.no_grad():
                gradients = backward(ctx, saved, *d_results)
            if is_compiling() or not torch.is_grad_enabled():
                return gradients
            return _FirstOrder.apply(operation, len(gradients), *gradients, *d_results, *saved)

        return run

    return decorate


class _FirstOrder(torch.autograd.Function):
    """Returns the gradients as results that depend on the other tensors, and cannot be differentiated."""

    @staticmethod
    def forward(ctx, operation, count, *tensors):
        ctx.operation = operation
        return tuple(None if x is None else x.detach() for x in tensors[:count])

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            f"{ctx.operation} has first-order gradients only, and a gradient computed with create_graph=True is being "
            "differentiated: for second derivatives, write the operation with PyTorch's own operators"
        )
