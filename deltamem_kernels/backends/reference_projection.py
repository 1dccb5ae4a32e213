"""memory_projection and segment_mean in plain PyTorch: the oracle of their tests."""

from __future__ import annotations

import torch
from torch import Tensor

from .arithmetic import accumulation_dtype, as_kernel

NORM_EPS = 1e-6
"""What a norm is raised to before something is divided by it."""


@as_kernel
def memory_projection_forward(
    x: Tensor,
    qkv_weight: Tensor,
    beta_weight: Tensor,
    beta_bias: Tensor | None,
    decay_weight: Tensor | None,
    decay_bias: Tensor | None,
    heads: int,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v `[..., H, R]`, beta, decay (empty without a weight) and the norms of tanh(Wq x), tanh(Wk x)
    `[2, ..., H]` (empty without `normalize`), in the dtype of the arithmetic."""
    dtype = accumulation_dtype(x, qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias)
    x = x.to(dtype)
    q, k, v = (x @ qkv_weight.to(dtype).T).unflatten(-1, (3, heads, -1)).movedim(-3, 0)
    norms = x.new_empty(0)
    if normalize:
        q, k = q.tanh(), k.tanh()
        norms = torch.stack([q, k]).norm(dim=-1).clamp_min(NORM_EPS)
        q, k = q / norms[0].unsqueeze(-1), k / norms[1].unsqueeze(-1)
    beta = _gate(x, beta_weight, beta_bias, heads, v.shape[-1])
    decay = x.new_empty(0) if decay_weight is None else _gate(x, decay_weight, decay_bias, heads, v.shape[-1])
    return q.contiguous(), k.contiguous(), v.contiguous(), beta, decay, norms


def _gate(x: Tensor, weight: Tensor, bias: Tensor | None, heads: int, rank: int) -> Tensor:
    logits = x @ weight.to(x.dtype).T
    gate = (logits if bias is None else logits + bias.to(x.dtype)).sigmoid()
    return gate.unflatten(-1, (heads, rank)) if weight.shape[0] == heads * rank else gate


@as_kernel
def memory_projection_backward(
    d_q: Tensor | None,
    d_k: Tensor | None,
    d_v: Tensor | None,
    d_beta: Tensor | None,
    d_decay: Tensor | None,
    x: Tensor | None,
    qkv_weight: Tensor,
    beta_weight: Tensor,
    beta_bias: Tensor | None,
    decay_weight: Tensor | None,
    decay_bias: Tensor | None,
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    decay: Tensor,
    norms: Tensor,
    x_dtype: torch.dtype,
    needs: list[bool],
) -> list[Tensor | None]:
    """Gradients of x, qkv_weight, beta_weight, beta_bias, decay_weight and decay_bias, in their dtypes; None where
    `needs` says that nobody asks. x is looked at for the weights' gradients alone, and may else be None."""
    d_projected = _through_the_activations(d_q, d_k, d_v, d_beta, d_decay, q, k, beta, decay, norms)
    weights = [qkv_weight, beta_weight] + ([] if decay_weight is None else [decay_weight])
    d_x = None
    if needs[0]:
        d_x = (d_projected @ torch.cat([w.to(q.dtype) for w in weights])).to(x_dtype)
    return [d_x, *weight_gradients(d_projected, x, qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias, needs)]


def _through_the_activations(d_q, d_k, d_v, d_beta, d_decay, q, k, beta, decay, norms) -> Tensor:
    """The gradient of Wx + b, `[..., 3·H·R + gates]` in the order q, k, v, beta, decay."""
    norm_q, norm_k = norms if norms.ndim > 1 else (None, None)
    parts = [_normalized_adjoint(d_q, q, norm_q), _normalized_adjoint(d_k, k, norm_k)]
    parts += [torch.zeros_like(q) if d_v is None else d_v, _sigmoid_adjoint(d_beta, beta)]
    if decay.ndim > 1:
        parts.append(_sigmoid_adjoint(d_decay, decay))
    return torch.cat([part.flatten(-2) if part.ndim == q.ndim else part for part in parts], dim=-1)


def _normalized_adjoint(d: Tensor | None, y: Tensor, norm: Tensor | None) -> Tensor:
    """From the gradient of y = t / norm, t = tanh(p), to that of p. A norm at its floor does not move with t."""
    if d is None:
        return torch.zeros_like(y)
    if norm is None:
        return d
    norm = norm.unsqueeze(-1)
    along = torch.where(norm > NORM_EPS, (d * y).sum(-1, keepdim=True), 0)
    return (d - y * along) / norm * (1 - (y * norm).square())


def _sigmoid_adjoint(d: Tensor | None, gate: Tensor) -> Tensor:
    return torch.zeros_like(gate) if d is None else d * gate * (1 - gate)


def weight_gradients(
    d_projected: Tensor,
    x: Tensor | None,
    qkv_weight: Tensor,
    beta_weight: Tensor,
    beta_bias: Tensor | None,
    decay_weight: Tensor | None,
    decay_bias: Tensor | None,
    needs: list[bool],
) -> list[Tensor | None]:
    """The gradients of the weights and biases, of which the former are one product over all tokens: one pass over x.
    From that of Wx + b; `needs` begins with x."""
    d_projected = d_projected.flatten(0, -2)
    d_weights = None
    if x is not None and any((needs[1], needs[2], needs[4])):
        d_weights = d_projected.T.mm(x.flatten(0, -2).to(d_projected.dtype))
    grads: list[Tensor | None] = []
    start = 0
    pairs = ((qkv_weight, None), (beta_weight, beta_bias), (decay_weight, decay_bias))
    for (weight, bias), need in zip(pairs, (needs[1:2], needs[2:4], needs[4:6]), strict=True):
        stop = start if weight is None else start + weight.shape[0]
        if need[0] and weight is not None and d_weights is not None:
            grads.append(d_weights[start:stop].to(weight.dtype, copy=True))
        else:
            grads.append(None)
        if len(need) == 2:
            grads.append(d_projected[:, start:stop].sum(0).to(bias.dtype) if need[1] and bias is not None else None)
        start = stop
    return grads


@as_kernel
def segment_mean_forward(
    x: Tensor, segment_ids: Tensor, num_segments: int, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """means `[B, M, D]` in x's dtype, and how many tokens each segment has, `[B, M]` int32."""
    B, _, D = x.shape
    writes = segment_ids >= 0 if mask is None else (segment_ids >= 0) & mask
    if x.device.type == "cpu" and (writes & (segment_ids >= num_segments)).any():
        wrong = int(segment_ids[writes].max())
        raise ValueError(f"segment_ids must be below num_segments={num_segments}, got {wrong}")
    at = _segments(segment_ids, num_segments, mask)
    counts = torch.zeros(B, num_segments + 1, dtype=torch.int32, device=x.device)
    counts.scatter_add_(1, at, torch.ones_like(at, dtype=torch.int32))
    sums = torch.zeros(B, num_segments + 1, D, dtype=accumulation_dtype(x), device=x.device)
    for t in range(x.shape[1]):  # one after another: the same order on every device
        sums[torch.arange(B, device=x.device), at[:, t]] += x[:, t]
    counts = counts[:, :num_segments].contiguous()
    return (sums[:, :num_segments] / counts.clamp_min(1).unsqueeze(-1)).to(x.dtype), counts


@as_kernel
def segment_mean_backward(d_means: Tensor, segment_ids: Tensor, counts: Tensor, mask: Tensor | None) -> Tensor:
    """The gradient of x, `[B, T, D]` in the dtype of d_means."""
    B, M, D = d_means.shape
    dtype = accumulation_dtype(d_means)
    share = d_means.to(dtype) / counts.clamp_min(1).unsqueeze(-1)
    share = torch.cat([share, share.new_zeros(B, 1, D)], dim=1)
    at = _segments(segment_ids, M, mask)
    return share.gather(1, at.unsqueeze(-1).expand(*at.shape, D)).to(d_means.dtype)


def _segments(segment_ids: Tensor, num_segments: int, mask: Tensor | None) -> Tensor:
    """int64 ids, with num_segments, one past the last, for a token that writes nothing."""
    writes = (segment_ids >= 0) & (segment_ids < num_segments)
    if mask is not None:
        writes = writes & mask
    return torch.where(writes, segment_ids.long(), num_segments)
