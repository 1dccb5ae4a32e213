"""Random problems for `memory_projection`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.memory_projection import MemoryProjection, memory_projection
from .problem import Dtypes, Problem, Results, finish


@dataclass
class ProjectionProblem(Problem):
    """A call of `memory_projection`."""

    def error_scale(self, name: str, exact: Results) -> float:
        """At rank 1 a normalized q or k is 1 or -1, and the gradients of their weights are zero but for rounding. Their
        error is relative to the weights of q, k and v together, as in one packed weight."""
        if name in ("d_q_weight", "d_k_weight") and exact["q"].shape[-1] == 1:
            return sum(exact[f"d_{part}_weight"].norm().item() ** 2 for part in "qkv") ** 0.5
        return super().error_scale(name, exact)

    def _cotangent(self, name: str, like: Tensor) -> Tensor:
        """Gradients of the gates have one sign: the gradient of a bias is their sum, which may be one number."""
        return torch.rand(like.shape) if name in ("beta", "decay") else torch.randn(like.shape)


def projection_weights(
    D: int,
    H: int,
    R: int,
    *,
    beta: str = "row",
    decay: str | None = "row",
    biases: bool = True,
    split: bool = False,
) -> dict[str, Tensor]:
    """Return float32 weights and biases by the names of `memory_projection`'s arguments. Some of their projections of a
    normal x are large enough to saturate tanh.

    Args:
        D, H, R: the sizes.
        beta, decay: "row" for a gate per state row, "head" for one per head; a decay of None leaves it out.
        biases: whether the gates have biases.
        split: return q_weight, k_weight and v_weight `[H·R, D]` in place of qkv_weight `[3·H·R, D]`.
    """
    rows = {"row": H * R, "head": H}
    scale = max(D, 1) ** 0.5
    qkv = 2 * torch.randn(3 * H * R, D) / scale
    names = ("q_weight", "k_weight", "v_weight")
    made = dict(zip(names, qkv.chunk(3), strict=True)) if split else {"qkv_weight": qkv}
    for name, gate in (("beta", beta), ("decay", decay)):
        if gate is not None:
            made[f"{name}_weight"] = torch.randn(rows[gate], D) / scale
            if biases:
                made[f"{name}_bias"] = torch.randn(rows[gate])
    return made


def projection_problem(
    *tokens: int,
    D: int = 40,
    H: int = 2,
    R: int = 8,
    beta: str = "row",
    decay: str | None = "row",
    biases: bool = True,
    split: bool = False,
    normalize: bool = True,
    dtype: Dtypes = torch.float32,
    fenced: bool = False,
    device: str | torch.device = "cpu",
) -> Problem:
    """Return a random call of `memory_projection` with x `[*tokens, D]`.

    Args:
        tokens: `B, T`, or `N` for decoding.
        D, H, R, beta, decay, biases: as in `projection_weights`.
        split: pass the weights of q, k and v as a tuple; their names are q_weight, k_weight and v_weight.
        normalize: as in `memory_projection`.
        dtype: of the operands.
        fenced: put every operand between NaN.
        device: of the operands.
    """
    weights = projection_weights(D, H, R, beta=beta, decay=decay, biases=biases, split=split)
    operands = finish({"x": torch.randn(*tokens, D), **weights}, dtype, device, fenced)
    return ProjectionProblem(project, operands, {"heads": H, "normalize": normalize})


def project(**call: Any) -> MemoryProjection:
    """Call `memory_projection` by keywords; q_weight, k_weight and v_weight may take the place of qkv_weight."""
    parts = tuple(call.pop(f"{name}_weight", None) for name in "qkv")
    if parts[0] is not None:
        call["qkv_weight"] = parts
    return memory_projection(**{"beta_bias": None, **call})
