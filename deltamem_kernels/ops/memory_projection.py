"""`memory_projection`: from hidden states to the memory's operands."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..backends import choose
from ..backends.eager import eager
from ..operands import ProjectionAdjoint, ProjectionOperands, QkvWeight
from ..operands.checks import check_backend, requires_grad
from ..operands.projection import qkv_parts
from .differentiation import first_order, refuse_tangents
from .operators import arguments, check_fake, define, empty_like_needed, present, where_needed


class MemoryProjection(NamedTuple):
    """What `memory_projection` returns, in this order what `delta_update` takes."""

    q: Tensor
    """`[B, T, H, R]`, as are k and v."""
    k: Tensor
    v: Tensor
    beta: Tensor
    """`[B, T, H, R]` where beta_weight has H·R rows, `[B, T, H]` where it has H."""
    decay: Tensor | None
    """Likewise; None without a decay_weight."""


def memory_projection(
    x: Tensor,
    qkv_weight: QkvWeight,
    beta_weight: Tensor,
    beta_bias: Tensor | None,
    decay_weight: Tensor | None = None,
    decay_bias: Tensor | None = None,
    *,
    heads: int = 1,
    normalize: bool = True,
    backend: str | None = None,
) -> MemoryProjection:
    """Project hidden states to the operands of δ-mem's memory (arXiv 2605.12357), in one pass over x.

    Per token and head::

        q = l2norm(tanh(Wq x))    k = l2norm(tanh(Wk x))    v = Wv x        l2norm(y) = y / max(|y|, 1e-6)
        β = sigmoid(Wβ x + bβ)    λ = sigmoid(Wλ x + bλ)

    Args:
        x: hidden states, `[B, T, D]`, or `[N, D]` for decoding; then the results have no T. float16, bfloat16, float32
            or float64, as are the weights and biases, in any mixture, any strides.
        qkv_weight: `[3·H·R, D]`, the rows of q, then k, then v, each with R rows per head; or a tuple of the three
            weights `[H·R, D]`. R from 1 to 128.
        beta_weight: `[H·R, D]`, a gate per state row, or `[H, D]`, one per head.
        beta_bias: as many numbers as beta_weight has rows; None means zeros.
        decay_weight, decay_bias: λ's, in either of beta's shapes; None where λ is not projected (it is 1 - β, or 1).
        heads: H.
        normalize: False leaves out tanh and l2norm: q = Wq x, k = Wk x.
        backend: as in `delta_update`.

    Returns:
        MemoryProjection: q, k, v, beta, decay. Products and sums are float32, or float64 if an operand is float64, and
        so are the results: the memory's arithmetic continues from there.

    First-order gradients for any subset of x, the weights and the biases. Backward keeps the results, 2·H norms per
    token and, only if a weight requires its gradient, x.

    Raises:
        TypeError, ValueError: an argument does not fit; nothing has run.
        NotImplementedError: an operand carries a tangent of forward-mode differentiation.
        BackendUnavailableError: the backend requested by name cannot run here.
    """
    operands = ProjectionOperands(
        x, qkv_parts(qkv_weight), beta_weight, beta_bias, decay_weight, decay_bias, heads, normalize
    )
    results = None if is_compiling() else eager.project(operands, backend)
    if results is None:
        operands.check()
        check_backend(backend)
        refuse_tangents("memory_projection", operands)
    if not results:
        results = _run(operands, backend or "")
    q, k, v, beta, decay = results
    return MemoryProjection(q, k, v, beta, None if decay_weight is None else decay)


def _run(operands: ProjectionOperands, backend: str) -> tuple[Tensor, ...]:
    if requires_grad(operands.tensors):
        x, qkv_weight, *rest = operands
        return _Projection.apply(x, *rest, backend, *qkv_weight)
    return torch.ops.deltamem_kernels.memory_projection(*operands, backend)[:5]


def _forward(*fields):
    *fields, backend = fields
    operands = ProjectionOperands(*fields)
    return tuple(choose(backend, operands.x.device).project(operands))


def _backward(*fields):
    *fields, backend, needs = fields
    adjoint = ProjectionAdjoint(*fields)
    return present(choose(backend, adjoint.q.device).project_backward(adjoint, needs))


def forward_fake(*fields):
    """Return empty results of the operator `memory_projection`."""
    *fields, backend = fields
    operands = ProjectionOperands(*fields)
    check_fake(backend, operands.x)
    return tuple(operands.empty_results())


def _backward_fake(*fields):
    *fields, _backend, needs = fields
    adjoint = ProjectionAdjoint(*fields)
    width = adjoint.beta_weight.shape[1]
    d_x = adjoint.q.new_empty((*adjoint.q.shape[:-2], width), dtype=adjoint.x_dtype)
    return [d_x] * needs[0] + empty_like_needed(adjoint.parameters, needs[1:])


# A decay that is not projected, and norms that are not taken, are empty tensors.
define(
    "memory_projection",
    f"({arguments(ProjectionOperands)}, str backend) "
    "-> (Tensor q, Tensor k, Tensor v, Tensor beta, Tensor decay, Tensor norms)",
    _forward,
    forward_fake,
)
define(
    "memory_projection_backward",
    f"({arguments(ProjectionAdjoint)}, str backend, bool[] needs) -> Tensor[]",
    _backward,
    _backward_fake,
)


class _Projection(torch.autograd.Function):
    """The one tensor or the three of qkv_weight come last, since autograd does not follow tensors in a list."""

    @staticmethod
    def forward(ctx, x, beta_weight, beta_bias, decay_weight, decay_bias, heads, normalize, backend, *qkv_weight):
        gates = beta_weight, beta_bias, decay_weight, decay_bias
        q, k, v, beta, decay, norms = torch.ops.deltamem_kernels.memory_projection(
            x, qkv_weight, *gates, heads, normalize, backend
        )
        needs_x = weights_need_gradients(ctx.needs_input_grad[1:5], ctx.needs_input_grad[8:])
        ctx.save_for_backward(x if needs_x else None, *gates, q, k, beta, decay, norms, *qkv_weight)
        ctx.x_dtype, ctx.backend = x.dtype, backend
        ctx.set_materialize_grads(False)
        return q, k, v, beta, decay

    @staticmethod
    @first_order("memory_projection")
    def backward(ctx, saved, d_q, d_k, d_v, d_beta, d_decay):
        x, gates, results, qkv_weight = saved[0], saved[1:5], saved[5:10], saved[10:]
        needs = [*ctx.needs_input_grad[:5], *ctx.needs_input_grad[8:]]
        grads = torch.ops.deltamem_kernels.memory_projection_backward(
            d_q, d_k, d_v, d_beta, d_decay, x, qkv_weight, *gates, *results, ctx.x_dtype, ctx.backend, needs
        )
        d_x, *rest = where_needed(grads, needs)
        return d_x, *rest[:4], None, None, None, *rest[4:]


def weights_need_gradients(gates: tuple[bool, ...], qkv_weight: tuple[bool, ...]) -> bool:
    """Return whether a weight requires its gradient, for which backward keeps x. gates: the flags of beta_weight,
    beta_bias, decay_weight and decay_bias."""
    return gates[0] or gates[2] or any(qkv_weight)
