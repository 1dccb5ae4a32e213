"""Operands as a layer would make them: hidden states, projected like the layer's own, squashed and normalised."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import Shape, Tensors

RANDOM_WIDTH = 64
BETA_BIAS = -1.5


def hidden_states(shape: Shape) -> Tensor:
    """`[B, T, D]`, float32, on the CPU: normal numbers, or those of a real dialogue."""
    if shape.source == "smollm2":
        from .smollm2 import dialogue_hidden_states

        return dialogue_hidden_states(shape.batch * shape.tokens).view(shape.batch, shape.tokens, -1)
    return torch.randn(shape.batch, shape.tokens, RANDOM_WIDTH, generator=torch.Generator().manual_seed(1))


def memory_operands(shape: Shape) -> Tensors:
    """q, k, v `[B, T, H, R]` and beta `[B, T, H, R]` or `[B, T, H]`, from fixed random projections."""
    x = hidden_states(shape)
    generator = torch.Generator().manual_seed(2)

    def project(rows: int) -> Tensor:
        bound = 1 / math.sqrt(x.shape[-1])  # kaiming_uniform_ with a = sqrt(5), the init of a linear layer
        weight = torch.empty(rows, x.shape[-1]).uniform_(-bound, bound, generator=generator)
        return (x @ weight.T).view(shape.batch, shape.tokens, shape.heads, -1)

    width = shape.heads * shape.rank
    q, k = (F.normalize(torch.tanh(project(width)), dim=-1, eps=1e-6) for _ in range(2))
    v = project(width)
    beta = torch.sigmoid(project(width if shape.gates == "row" else shape.heads) + BETA_BIAS)
    operands = {"q": q, "k": k, "v": v, "beta": beta if shape.gates == "row" else beta.squeeze(-1)}
    return {name: operand.to(shape.device, shape.dtype) for name, operand in operands.items()}
