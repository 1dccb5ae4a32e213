"""Inputs that resemble those of a real layer: hidden states, their projections, and rotary tables."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import Shape, Tensors

RANDOM_WIDTH = 64
BETA_BIAS = -1.5


def hidden_states(shape: Shape) -> Tensor:
    """Return hidden states `[B, T, D]`, float32, on the CPU: random normal numbers, or those of a real dialogue."""
    if shape.source == "smollm2":
        from .smollm2 import dialogue_hidden_states

        return dialogue_hidden_states(shape.batch * shape.tokens).view(shape.batch, shape.tokens, -1)
    return torch.randn(shape.batch, shape.tokens, RANDOM_WIDTH, generator=torch.Generator().manual_seed(1))


def memory_operands(shape: Shape) -> Tensors:
    """Return q, k, v `[B, T, H, R]` and beta `[B, T, H, R]` or `[B, T, H]`, from fixed random projections."""
    x = hidden_states(shape)
    generator = torch.Generator().manual_seed(2)

    def project(rows: int) -> Tensor:
        bound = 1 / math.sqrt(x.shape[-1])  # kaiming_uniform_ with a = sqrt(5), as in nn.Linear
        weight = torch.empty(rows, x.shape[-1]).uniform_(-bound, bound, generator=generator)
        return (x @ weight.T).view(shape.batch, shape.tokens, shape.heads, -1)

    width = shape.heads * shape.rank
    q, k = (F.normalize(torch.tanh(project(width)), dim=-1, eps=1e-6) for _ in range(2))
    v = project(width)
    beta = torch.sigmoid(project(width if shape.gates == "row" else shape.heads) + BETA_BIAS)
    operands = {"q": q, "k": k, "v": v, "beta": beta if shape.gates == "row" else beta.squeeze(-1)}
    return {name: operand.to(shape.device, shape.dtype) for name, operand in operands.items()}


def rotary_tables(head_dim: int, first: int, tokens: int) -> Tensors:
    """Return the rotary embedding's cos and sin `[1, T, head_dim]`, float32, for positions `first` and up."""
    frequencies = 10000.0 ** -torch.linspace(0, 1, head_dim // 2)
    angles = torch.arange(first, first + tokens)[None, :, None] * torch.cat((frequencies, frequencies))
    return {"cos": angles.cos(), "sin": angles.sin()}
