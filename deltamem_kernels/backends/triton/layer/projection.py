"""Launches: the projection from hidden states to q, k, v and the gates, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ....operands import Projected, ProjectionAdjoint, ProjectionOperands
from ...base import Gradients, plain_torch
from ...reference.projection import parameter_gradients
from ..launch import Launch, cdiv, next_power_of_2, run, strides
from .projection_kernels import (
    memory_projection_adjoint_kernel,
    memory_projection_input_kernel,
    memory_projection_kernel,
    memory_projection_token_kernel,
)

FEW = 16
"""Up to this number of tokens per sequence, which would not fill a tile of the matrix units, each token has programs of
its own."""


def project(operands: ProjectionOperands) -> Projected:
    """See `Backend.project`."""
    launch, projected = projection_launch(operands)
    run([launch], operands.x.device)
    return projected


@plain_torch
def project_backward(adjoint: ProjectionAdjoint, needs: list[bool]) -> Gradients:
    """See `Backend.project_backward`. The gradients of the weights are matrix products over all tokens, by PyTorch."""
    launch, d_projected = adjoint_launch(adjoint)
    launches, d_x = [launch], None
    if needs[0]:
        launch, d_x = input_launch(adjoint, d_projected)
        launches.append(launch)
    run(launches, adjoint.q.device)
    return [d_x, *parameter_gradients(adjoint, d_projected, needs)]


def projection_launch(operands: ProjectionOperands) -> tuple[Launch, Projected]:
    """Return the launch, and the results that it fills."""
    dtype, H, R = operands.dtype, operands.heads, operands.rank
    x = as_factor(operands.x, dtype)
    T = 1 if x.ndim == 2 else x.shape[1]
    tokens = x.shape[:-1].numel()
    projected = operands.empty_results()
    arguments = weight_arguments(operands, dtype) | {f"p_{name}": y for name, y in projected._asdict().items()}
    arguments |= {"p_x": x} | strides("x", x, "btd", "bd" if x.ndim == 2 else "btd")
    arguments |= {"tokens": tokens, "T": T, "D": x.shape[-1], "H": H, "R": R, "NORMALIZE": operands.normalize}
    arguments |= tiling(T, H, R, dtype)
    if T <= FEW:
        parts = 4 if operands.decay_weight is None else 5
        return Launch(memory_projection_token_kernel, (tokens, H * parts), arguments), projected
    arguments["PRECISION"] = precision(operands)
    grid = (tokens // T * cdiv(T, arguments["BLOCK_M"]), cdiv(H, arguments["HEADS"]))
    return Launch(memory_projection_kernel, grid, arguments), projected


def weight_arguments(operands: ProjectionOperands, dtype: torch.dtype) -> dict[str, Any]:
    """Return pointers and strides of weights and biases. The weights of q, k and v share their strides."""
    parts = operands.qkv_weight
    q, k, v = (as_factor(part, dtype) for part in (parts if len(parts) == 3 else parts[0].chunk(3)))
    if not q.stride() == k.stride() == v.stride():
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    arguments: dict[str, Any] = {"p_q_weight": q, "p_k_weight": k, "p_v_weight": v} | strides("qkv", q, "rd")
    width = q.shape[0]
    gates = {
        "beta": (operands.beta_weight, operands.beta_bias),
        "decay": (operands.decay_weight, operands.decay_bias),
    }
    for name, (weight, bias) in gates.items():
        weight = None if weight is None else as_factor(weight, dtype)
        arguments |= {f"p_{name}_weight": weight, f"p_{name}_bias": bias} | strides(name, weight, "rd")
        arguments[f"{name}_bias_s"] = 1 if bias is None else bias.stride(0)
        arguments[f"{name.upper()}_PER_HEAD"] = weight is not None and weight.shape[0] != width
    return arguments


def adjoint_launch(adjoint: ProjectionAdjoint) -> tuple[Launch, Tensor]:
    """Return the launch, and the gradient of Wx + b that it fills, `[..., rows]`."""
    q, beta, decay, norms = adjoint.q, adjoint.beta, adjoint.decay, adjoint.norms
    *lead, H, R = q.shape
    rows = sum(weight.shape[0] for weight in adjoint.weights)
    d_projected = q.new_empty((*lead, rows))
    tokens = d_projected.shape[:-1].numel()
    rank = next_power_of_2(R)
    heads = min(next_power_of_2(H), max(1, 64 // rank))
    arguments: dict[str, Any] = {"p_dprojected": d_projected, "tokens": tokens, "H": H, "rows": rows, "R": R}
    for name in ("q", "k", "v", "beta", "decay"):
        d = getattr(adjoint, f"d_{name}")
        arguments[f"p_d{name}"] = None if d is None else d.contiguous()
    arguments |= {"p_q": q, "p_k": adjoint.k, "p_beta": beta, "p_decay": decay, "p_norms": norms}
    arguments |= {"BETA_PER_HEAD": beta.ndim != q.ndim, "DECAY_PER_HEAD": decay.ndim != q.ndim}
    arguments |= {"NORMALIZE": norms.shape != (0,), "DECAY": adjoint.decay_weight is not None}
    arguments |= {"HEADS": heads, "RANK": rank, "BLOCK_M": 16, "num_warps": 4}
    grid = (cdiv(tokens, 16), cdiv(H, heads))
    return Launch(memory_projection_adjoint_kernel, grid, arguments), d_projected


def input_launch(adjoint: ProjectionAdjoint, d_projected: Tensor) -> tuple[Launch, Tensor]:
    """Return the launch, and the gradient of x that it fills."""
    dtype = d_projected.dtype
    weight = as_factor(torch.cat(adjoint.weights), dtype)
    *lead, rows = d_projected.shape
    D = weight.shape[1]
    tokens = d_projected.shape[:-1].numel()
    d_x = d_projected.new_empty((*lead, D), dtype=adjoint.x_dtype)
    arguments: dict[str, Any] = {
        "p_dprojected": d_projected,
        "p_w": weight,
        "p_dx": d_x,
        "tokens": tokens,
        "rows": rows,
        "D": D,
    }
    arguments |= {"w_sr": weight.stride(0), "PRECISION": "ieee" if d_x.dtype.itemsize > 2 else "tf32x3"}
    tiles = (32, 16, 32) if dtype == torch.float64 else (32, 32, 64)
    arguments |= dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_D"), tiles, strict=True)) | {"num_warps": 8, "num_stages": 2}
    grid = (cdiv(tokens, arguments["BLOCK_M"]), cdiv(D, arguments["BLOCK_D"]))
    return Launch(memory_projection_input_kernel, grid, arguments), d_x


def tiling(T: int, H: int, R: int, dtype: torch.dtype) -> dict[str, int]:
    """Return tiles and warps. They depend only on T, H and R, so that a sequence has the same bits alone and in a
    batch."""
    rank = next_power_of_2(R)
    if T <= FEW:
        return {"HEADS": 1, "RANK": rank, "BLOCK_D": max(16, 4096 // rank), "num_warps": 4}
    heads = max(16 // rank, min(next_power_of_2(H), 64 // rank), 1)
    width = heads * rank
    tokens, columns = {16: (64, 32), 32: (32, 32), 64: (32, 32)}.get(width, (16, 16))
    if dtype == torch.float64:
        tokens, columns = 16, 16
    warps, stages = (4, 3) if width < 32 and dtype != torch.float64 else (8, 2)
    tiles = {"HEADS": heads, "RANK": rank, "BLOCK_M": tokens, "BLOCK_D": columns}
    return tiles | {"num_warps": warps, "num_stages": stages}


def precision(operands: ProjectionOperands) -> str:
    """Return the precision of tl.dot. Products of 16-bit numbers are exact in TF32. Where only x has 16 bits, three
    TF32 products hold the weights to 22 bits. Everything else takes the plain multipliers."""
    if operands.dtype == torch.float64 or operands.x.dtype.itemsize != 2:
        return "ieee"
    return "tf32" if all(weight.dtype.itemsize == 2 for weight in operands.weights) else "tf32x3"


def as_factor(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert x for tl.dot, which does not compile for 16 bits in float64 arithmetic."""
    return x.float() if dtype == torch.float64 and x.dtype.itemsize == 2 else x
