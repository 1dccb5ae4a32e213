"""Random problems for the two forms of the correction of attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.attention_correction import attention_correction
from ..ops.attention_correction_norm_rope import attention_correction_norm_rope
from .problem import Dtypes, Problem, Results, finish


@dataclass
class CorrectionProblem(Problem):
    """A call of `attention_correction` or `attention_correction_norm_rope`. A scale that is a tensor is an operand."""

    def error_scale(self, name: str, exact: Results) -> float:
        """The gradient of the scale is a sum of numbers of both signs, which may cancel. Its error is relative to what
        the sum is at most."""
        if name != "d_scale":
            return super().error_scale(name, exact)
        scale, reads = (self.operands[name].detach().double().cpu() for name in ("scale", "reads"))
        return (exact["d_reads"].norm() * reads.norm() / scale).item()


def correction_problem(
    B: int | None = 2,
    T: int = 5,
    H: int | None = 1,
    R: int = 8,
    D: int = 24,
    *,
    head_dim: int = 0,
    norm: bool = False,
    rope: bool = False,
    one_rope: bool = False,
    scale: float | None = None,
    dtype: Dtypes = torch.float32,
    fenced: bool = False,
    device: str | torch.device = "cpu",
) -> CorrectionProblem:
    """Return a random call of `attention_correction`, or with a head_dim of `attention_correction_norm_rope`.

    Args:
        B, T: the tokens. B None makes `[T, D]`, as in decoding.
        H, R, D: the sizes. H None leaves the heads' dimension out.
        head_dim: the size of an attention head.
        norm: whether there is a norm.
        rope: whether there are tables of a rotary embedding.
        one_rope: the batch shares the tables.
        scale: a number; None makes it a tensor, which has a gradient.
        dtype: of the operands and tables.
        fenced: put every operand and table between NaN.
        device: of all tensors.
    """
    rows = (T,) if B is None else (B, T)
    operands = {
        "base": torch.randn(*rows, D),
        "reads": torch.randn(*rows, *(() if H is None else (H,)), R),
        "weight": torch.randn(D, (H or 1) * R) / R**0.5,
    }
    if scale is None:
        operands["scale"] = torch.tensor(1.7)
    if norm:
        operands["norm_weight"] = torch.rand(head_dim or D) + 0.5
    # With a large eps the gradient along what is normed is not the difference of two nearly equal numbers.
    options: dict[str, Any] = {"norm_eps": 0.5} | ({} if scale is None else {"scale": scale})
    if head_dim:
        options["head_dim"] = head_dim
    if rope:  # no angles: exchanged halves or tables would show
        shape = (1 if one_rope else rows[0], *rows[1:], head_dim)
        tables: dict[str, Tensor] = {"cos": torch.randn(shape), "sin": torch.randn(shape)}
        options |= finish(tables, dtype, device, fenced)
    operation = attention_correction_norm_rope if head_dim else attention_correction
    return CorrectionProblem(operation, finish(operands, dtype, device, fenced), options)
