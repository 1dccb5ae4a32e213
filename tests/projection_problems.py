"""What the tests of memory_projection share: the operation in plain PyTorch, and a check against it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from problems import check
from torch import Tensor

from deltamem_kernels.testing import Problem

NAMES = ("x", "qkv_weight", "beta_weight", "beta_bias", "decay_weight", "decay_bias")
SPLIT_NAMES = ("x", "q_weight", "k_weight", "v_weight", *NAMES[2:])
RESULTS = ("q", "k", "v", "beta", "decay")
GATES = ("row", "head", None)  # of a weight's rows; without a weight there is no gate


def plain_projection(
    x: Tensor,
    qkv_weight: Tensor | None = None,
    beta_weight: Tensor | None = None,
    beta_bias: Tensor | None = None,
    decay_weight: Tensor | None = None,
    decay_bias: Tensor | None = None,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    v_weight: Tensor | None = None,
    heads: int,
    normalize: bool = True,
    backend: str | None = None,
) -> dict[str, Tensor]:
    """The operation in plain PyTorch, in the operands' dtype."""
    weights = qkv_weight.chunk(3) if qkv_weight is not None else (q_weight, k_weight, v_weight)
    q, k, v = (F.linear(x, weight).unflatten(-1, (heads, -1)) for weight in weights)
    if normalize:
        q, k = (F.normalize(torch.tanh(y), dim=-1, eps=1e-6) for y in (q, k))
    results = {"q": q, "k": k, "v": v}
    for name, weight, bias in (("beta", beta_weight, beta_bias), ("decay", decay_weight, decay_bias)):
        if weight is not None:
            gate = torch.sigmoid(F.linear(x, weight, bias))
            results[name] = gate.unflatten(-1, (heads, -1)) if len(weight) == v.shape[-2:].numel() else gate
    return results


def check_projection(problem: Problem, implementation, **options) -> dict[str, Tensor]:
    """Check values and gradients against plain PyTorch in float64. Results must be contiguous, and float32, or float64
    if an operand is."""
    ours = check(problem, implementation, oracle=plain_projection, **options)
    double = any(x.dtype == torch.float64 for x in problem.operands.values())
    for name in ours.keys() & RESULTS:
        assert ours[name].dtype == (torch.float64 if double else torch.float32), name
        assert ours[name].is_contiguous(), name
    return ours
