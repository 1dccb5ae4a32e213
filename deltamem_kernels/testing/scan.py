"""Random problems for `delta_update`, and operands for `delta_step`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.delta_update import delta_update
from .problem import Dtypes, Problem, finish


def memory_operands(
    rows: Sequence[int],
    R: int,
    *,
    decay: bool = False,
    beta_per_head: bool = False,
    decay_per_head: bool = False,
    device: str | torch.device = "cpu",
) -> dict[str, Tensor]:
    """Return float32 operands as δ-mem has them: unit keys and queries, gates between 0 and 1.

    Args:
        rows: the leading dimensions, `[B, T, H]` for `delta_update`, `[N, H]` or `[N, T, H]` for `delta_step`.
        R: the rank of the state.
        decay: whether there is a decay of its own.
        beta_per_head, decay_per_head: one gate per head in place of R.
        device: of the operands.
    """

    def unit() -> Tensor:
        return torch.nn.functional.normalize(torch.randn(*rows, R), dim=-1)

    def gate(per_head: bool) -> Tensor:
        return torch.rand(*rows) if per_head else torch.rand(*rows, R)

    made = {"q": unit(), "k": unit(), "v": torch.randn(*rows, R), "beta": gate(beta_per_head)}
    if decay:
        made["decay"] = gate(decay_per_head)
    return {name: x.to(device) for name, x in made.items()}


def scan_problem(
    B: int = 2,
    T: int = 70,
    H: int = 2,
    R: int = 8,
    *,
    mode: str = "standard",
    decay: bool = False,
    beta_per_head: bool = False,
    decay_per_head: bool = False,
    state: bool = True,
    mask: bool = False,
    lengths: Sequence[int] | None = None,
    index_dtype: torch.dtype = torch.int64,
    dtype: Dtypes = torch.float32,
    fenced: bool = False,
    device: str | torch.device = "cpu",
) -> Problem:
    """Return a random call of `delta_update`.

    Args:
        B, T, H, R: the sizes.
        mode, decay, beta_per_head, decay_per_head: the form of the gates.
        state: whether there is an initial state.
        mask: whether there is a mask. About six tokens of ten count.
        lengths: of packed sequences; B is then 1 and T their sum.
        index_dtype: of cu_seqlens.
        dtype: of the operands.
        fenced: put every operand between NaN, and give the mask other strides.
        device: of all tensors.
    """
    if lengths is not None:
        B, T = 1, sum(lengths)
    operands = memory_operands((B, T, H), R, decay=decay, beta_per_head=beta_per_head, decay_per_head=decay_per_head)
    if state:
        operands["initial_state"] = torch.randn(B if lengths is None else len(lengths), H, R, R)
    options: dict[str, Any] = {"mode": mode}
    if mask:
        chosen = (torch.rand(B, T) < 0.6).to(device)
        options["mask"] = chosen.t().contiguous().t() if fenced else chosen
    if lengths is not None:
        bounds = [0, *itertools.accumulate(lengths)]
        options["cu_seqlens"] = torch.tensor(bounds, dtype=index_dtype, device=device)
    return Problem(delta_update, finish(operands, dtype, device, fenced), options)
