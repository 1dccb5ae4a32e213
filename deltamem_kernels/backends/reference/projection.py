"""`memory_projection` in plain PyTorch: the oracle of its tests."""

from __future__ import annotations

import torch
from torch import Tensor

from ...operands import Projected, ProjectionAdjoint, ProjectionOperands
from ..base import Gradients, plain_torch

NORM_EPS = 1e-6
"""A norm below this is raised to it before the division."""


@plain_torch
def project(operands: ProjectionOperands) -> Projected:
    """See `Backend.project`."""
    dtype, heads = operands.dtype, operands.heads
    x = operands.x.to(dtype)
    qkv_weight = torch.cat([weight.to(dtype) for weight in operands.qkv_weight])
    q, k, v = (x @ qkv_weight.T).unflatten(-1, (3, heads, -1)).movedim(-3, 0)
    norms = x.new_empty(0)
    if operands.normalize:
        q, k = q.tanh(), k.tanh()
        norms = torch.stack([q, k]).norm(dim=-1).clamp_min(NORM_EPS)
        q, k = q / norms[0].unsqueeze(-1), k / norms[1].unsqueeze(-1)
    beta, decay = _gate(x, operands.beta_weight, operands.beta_bias), x.new_empty(0)
    if operands.decay_weight is not None:
        decay = _gate(x, operands.decay_weight, operands.decay_bias).view(operands.gate_shape(operands.decay_weight))
    beta = beta.view(operands.gate_shape(operands.beta_weight))
    return Projected(q.contiguous(), k.contiguous(), v.contiguous(), beta, decay, norms)


def _gate(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = x @ weight.to(x.dtype).T
    return (logits if bias is None else logits + bias.to(x.dtype)).sigmoid()


@plain_torch
def project_backward(adjoint: ProjectionAdjoint, needs: list[bool]) -> Gradients:
    """See `Backend.project_backward`."""
    d_projected = _through_the_activations(adjoint)
    d_x = None
    if needs[0]:
        weights = torch.cat([weight.to(d_projected.dtype) for weight in adjoint.weights])
        d_x = (d_projected @ weights).to(adjoint.x_dtype)
    return [d_x, *parameter_gradients(adjoint, d_projected, needs)]


def _through_the_activations(adjoint: ProjectionAdjoint) -> Tensor:
    """Return the gradient of Wx + b, `[..., 3·H·R + gates]` in the order q, k, v, beta, decay."""
    q, decay, norms = adjoint.q, adjoint.decay, adjoint.norms
    norm_q, norm_k = norms if norms.ndim > 1 else (None, None)
    parts = [_normalized_adjoint(adjoint.d_q, q, norm_q), _normalized_adjoint(adjoint.d_k, adjoint.k, norm_k)]
    parts.append(torch.zeros_like(q) if adjoint.d_v is None else adjoint.d_v)
    parts.append(_sigmoid_adjoint(adjoint.d_beta, adjoint.beta))
    if decay.ndim > 1:
        parts.append(_sigmoid_adjoint(adjoint.d_decay, decay))
    return torch.cat([part.flatten(-2) if part.ndim == q.ndim else part for part in parts], dim=-1)


def _normalized_adjoint(d: Tensor | None, y: Tensor, norm: Tensor | None) -> Tensor:
    """Return the gradient of p, from that of y = t / norm with t = tanh(p). A norm at its floor is a constant."""
    if d is None:
        return torch.zeros_like(y)
    if norm is None:
        return d
    norm = norm.unsqueeze(-1)
    along = torch.where(norm > NORM_EPS, (d * y).sum(-1, keepdim=True), 0)
    return (d - y * along) / norm * (1 - (y * norm).square())


def _sigmoid_adjoint(d: Tensor | None, gate: Tensor) -> Tensor:
    return torch.zeros_like(gate) if d is None else d * gate * (1 - gate)


def parameter_gradients(adjoint: ProjectionAdjoint, d_projected: Tensor, needs: list[bool]) -> Gradients:
    """Return the gradients of `adjoint.parameters` from d_projected, the gradient of Wx + b. Those of the weights are
    one product over all tokens, so that x is read once. `needs` begins with x."""
    d_rows = d_projected.flatten(0, -2)
    _, beta_weight, beta_bias, decay_weight, decay_bias, *qkv = needs
    d_weights = None
    if adjoint.x is not None and any((beta_weight, decay_weight, *qkv)):
        d_weights = d_rows.T.mm(adjoint.x.flatten(0, -2).to(d_rows.dtype))
    start = 0

    def gradient(weight: Tensor | None, bias: Tensor | None, needs_weight: bool, needs_bias: bool) -> Gradients:
        """The gradients of the next rows' weight and bias."""
        nonlocal start
        if weight is None:
            return [None, None]
        rows = slice(start, start + weight.shape[0])
        start = rows.stop
        d_weight = d_weights[rows].to(weight.dtype, copy=True) if needs_weight and d_weights is not None else None
        return [d_weight, d_rows[:, rows].sum(0).to(bias.dtype) if needs_bias and bias is not None else None]

    of_qkv = [gradient(weight, None, need, False)[0] for weight, need in zip(adjoint.qkv_weight, qkv, strict=True)]
    of_beta = gradient(adjoint.beta_weight, adjoint.beta_bias, beta_weight, beta_bias)
    of_decay = gradient(adjoint.decay_weight, adjoint.decay_bias, decay_weight, decay_bias)
    return [*of_beta, *of_decay, *of_qkv]
