"""Launches of the kernels in projection.py: what they are given, and how the work is cut."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..arithmetic import accumulation_dtype, as_kernel
from ..reference_projection import weight_gradients
from .launch import launch
from .projection import (
    memory_projection_adjoint_kernel,
    memory_projection_input_kernel,
    memory_projection_kernel,
    memory_projection_token_kernel,
)

FEW = 16
"""Up to so many tokens of a sequence, which a tile of the matrix units would not fill, each has programs of its own."""


def tiling(T: int, H: int, R: int, dtype: torch.dtype) -> dict[str, int]:
    """Tiles and warps. They depend on T, H and R alone: a sequence has the same bits alone and in a batch."""
    rank = triton.next_power_of_2(R)
    if T <= FEW:
        return {"HEADS": 1, "RANK": rank, "BLOCK_D": max(16, 4096 // rank), "num_warps": 4, "num_stages": 1}
    heads = max(16 // rank, min(triton.next_power_of_2(H), 64 // rank), 1)
    width = heads * rank
    tokens, columns = {16: (64, 32), 32: (32, 32), 64: (32, 32)}.get(width, (16, 16))
    if dtype == torch.float64:
        tokens, columns = 16, 16
    tiles = {"HEADS": heads, "RANK": rank, "BLOCK_M": tokens, "BLOCK_D": columns}
    if width < 32 and dtype != torch.float64:
        return tiles | {"num_warps": 4, "num_stages": 3}
    return tiles | {"num_warps": 8, "num_stages": 2}


def precision(*factors: Tensor) -> str:
    """Of tl.dot on float32: products of 16-bit numbers are exact in TF32; with one factor of 16 bits, three TF32
    products hold the other to 22 bits; float32 takes the plain multipliers."""
    narrow = [x.dtype.itemsize == 2 for x in factors]
    return "tf32" if all(narrow) else "tf32x3" if narrow[0] else "ieee"


def factor(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What tl.dot takes beside float64: of 16 bits it compiles no such product."""
    return x.float() if dtype == torch.float64 and x.dtype.itemsize == 2 else x


def forward_arguments(
    x: Tensor,
    qkv_weight: Tensor,
    beta_weight: Tensor,
    beta_bias: Tensor | None,
    decay_weight: Tensor | None,
    decay_bias: Tensor | None,
    heads: int,
    normalize: bool,
) -> tuple[object, tuple[int, int], dict]:
    """A kernel, its grid, and its arguments with the outputs allocated."""
    weights = {"qkv": qkv_weight, "beta": beta_weight, "decay": decay_weight}
    biases = {"beta": beta_bias, "decay": decay_bias}
    dtype = accumulation_dtype(x, *weights.values(), *biases.values())
    x = factor(x, dtype)
    weights = {name: None if weight is None else factor(weight, dtype) for name, weight in weights.items()}
    lead, H, R = x.shape[:-1], heads, qkv_weight.shape[0] // (3 * heads)
    T = 1 if x.ndim == 2 else x.shape[1]
    tokens = lead.numel()
    strides = x.stride() if x.ndim == 3 else (x.stride(0), 0, x.stride(1))

    def gate(weight: Tensor | None) -> Tensor:
        shape = (0,) if weight is None else (*lead, H, R) if weight.shape[0] == H * R else (*lead, H)
        return x.new_empty(shape, dtype=dtype)

    arguments = {f"p_{name}": x.new_empty((*lead, H, R), dtype=dtype) for name in ("q", "k", "v")}
    arguments |= {"p_beta": gate(beta_weight), "p_decay": gate(decay_weight)}
    arguments["p_norms"] = x.new_empty((2, *lead, H) if normalize else (0,), dtype=dtype)
    arguments |= {"p_x": x, "tokens": tokens, "T": T, "D": x.shape[-1], "H": H, "R": R, "NORMALIZE": normalize}
    arguments |= dict(zip(("x_sb", "x_st", "x_sd"), strides, strict=True))
    for name, weight in weights.items():
        s_r, s_d = (0, 0) if weight is None else weight.stride()
        arguments |= {f"p_{name}_weight": weight, f"{name}_sr": s_r, f"{name}_sd": s_d}
        if name in biases:
            bias = biases[name]
            arguments[f"{name.upper()}_PER_HEAD"] = weight is not None and weight.shape[0] != H * R
            arguments |= {f"p_{name}_bias": bias, f"{name}_bias_s": 0 if bias is None else bias.stride(0)}
    arguments |= tiling(T, H, R, dtype) | {"enable_fp_fusion": True}
    if T <= FEW:
        parts = 4 if decay_weight is None else 5
        return memory_projection_token_kernel, (tokens, H * parts), arguments
    arguments["PRECISION"] = precision(x, *(w for w in weights.values() if w is not None))
    grid = (tokens // T * triton.cdiv(T, arguments["BLOCK_M"]), triton.cdiv(H, arguments["HEADS"]))
    return memory_projection_kernel, grid, arguments


def memory_projection_forward(*operands) -> tuple[Tensor, ...]:
    """q, k, v, beta, decay and norms, as in backends/reference_projection.py."""
    kernel, grid, arguments = forward_arguments(*operands)
    launch(kernel, grid, arguments, operands[0])
    return tuple(arguments[f"p_{name}"] for name in ("q", "k", "v", "beta", "decay", "norms"))


def adjoint_arguments(d_q, d_k, d_v, d_beta, d_decay, q, k, beta, decay, norms) -> tuple[tuple[int, int], dict]:
    """Grid and arguments of memory_projection_adjoint_kernel with its output allocated."""
    *lead, H, R = q.shape
    tokens = q.shape[:-2].numel()
    absent = decay.shape == (0,)
    rows = 3 * H * R + (H * R if beta.ndim == q.ndim else H)
    if not absent:
        rows += H * R if decay.ndim == q.ndim else H
    cotangents = {"q": d_q, "k": d_k, "v": d_v, "beta": d_beta, "decay": d_decay}
    rank = triton.next_power_of_2(R)
    heads = min(triton.next_power_of_2(H), max(1, 64 // rank))
    arguments = {f"p_d{name}": None if d is None else d.contiguous() for name, d in cotangents.items()}
    arguments |= {"p_q": q, "p_k": k, "p_beta": beta, "p_decay": decay, "p_norms": norms}
    arguments |= {"p_dprojected": q.new_empty((*lead, rows)), "tokens": tokens, "H": H, "rows": rows, "R": R}
    arguments |= {"BETA_PER_HEAD": beta.ndim != q.ndim, "DECAY_PER_HEAD": decay.ndim != q.ndim}
    arguments |= {"NORMALIZE": norms.shape != (0,), "DECAY": not absent, "HEADS": heads, "RANK": rank}
    arguments |= {"BLOCK_M": 16, "num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
    return (triton.cdiv(tokens, 16), triton.cdiv(H, heads)), arguments


def input_arguments(d_projected: Tensor, weights: list[Tensor], x_dtype: torch.dtype) -> tuple[tuple[int, int], dict]:
    """Grid and arguments of memory_projection_input_kernel with its output allocated."""
    *lead, rows = d_projected.shape
    tokens = d_projected.shape[:-1].numel()
    weight = factor(torch.cat(weights), d_projected.dtype)
    D = weight.shape[1]
    d_x = d_projected.new_empty((*lead, D), dtype=x_dtype)
    wide = d_projected.dtype == torch.float64
    tiles = {"BLOCK_M": 32, "BLOCK_N": 16 if wide else 32, "BLOCK_D": 32 if wide else 64}
    arguments = {"p_dprojected": d_projected, "p_w": weight, "p_dx": d_x, "tokens": tokens, "rows": rows, "D": D}
    arguments |= {"w_sr": weight.stride(0), "PRECISION": "ieee" if x_dtype.itemsize > 2 else "tf32x3"} | tiles
    arguments |= {"num_warps": 8, "num_stages": 2, "enable_fp_fusion": True}
    return (triton.cdiv(tokens, tiles["BLOCK_M"]), triton.cdiv(D, tiles["BLOCK_D"])), arguments


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
    """As in backends/reference_projection.py. The weights' gradients are matrix products over all tokens: torch's."""
    grid, arguments = adjoint_arguments(d_q, d_k, d_v, d_beta, d_decay, q, k, beta, decay, norms)
    d_projected = arguments["p_dprojected"]
    launch(memory_projection_adjoint_kernel, grid, arguments, q)
    d_x = None
    if needs[0]:
        weights = [w for w in (qkv_weight, beta_weight, decay_weight) if w is not None]
        grid, arguments = input_arguments(d_projected, weights, x_dtype)
        d_x = arguments["p_dx"]
        launch(memory_projection_input_kernel, grid, arguments, q)
    return [d_x, *weight_gradients(d_projected, x, qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias, needs)]
