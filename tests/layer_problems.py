"""What the tests of memory_prefill and memory_decode share."""

from __future__ import annotations

import torch
from torch import Tensor

from deltamem_kernels.testing import between_nans, projection_weights

N, SLOTS, PAD, D, HEAD = 5, 9, -1, 37, 6
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def parameters(
    H: int, R: int, decay: bool, per_head: bool = False, width: int = D, split: bool = False
) -> dict[str, object]:
    """Weights by the names of the arguments; with `split`, those of q, k and v in a tuple."""
    forms = {"beta": "head" if per_head else "row", "decay": "row" if decay else None}
    made: dict = projection_weights(width, H, R, split=split, **forms)
    return {"qkv_weight": tuple(made.pop(f"{part}_weight") for part in "qkv"), **made} if split else made


def correction(H: int, R: int, form: str, rows: int = N) -> dict:
    """base and its operands: "plain", "norm" over the correction, or "heads" with norm and rotary embedding."""
    made: dict = {"base": torch.randn(rows, 4 * HEAD), "delta_weight": torch.randn(4 * HEAD, H * R), "scale": 0.7}
    if form == "norm":
        made["norm_weight"] = torch.randn(4 * HEAD)
    if form == "heads":
        made |= {"head_dim": HEAD, "norm_weight": torch.randn(HEAD)}
        made |= {"cos": torch.randn(rows, HEAD), "sin": torch.randn(rows, HEAD)}
    return made


def to(made: dict, device: str | None = None, dtype: torch.dtype | None = None, fenced: bool = False) -> dict:
    """Copies on a device and in a dtype; `fenced` puts them between NaN."""

    def move(x: object) -> object:
        if isinstance(x, tuple):
            return tuple(map(move, x))
        if not isinstance(x, Tensor):
            return x
        copy = x.detach().to(device=device, dtype=dtype if x.is_floating_point() else None).clone()
        return between_nans(copy) if fenced else copy

    return {name: move(x) for name, x in made.items()}


def meta(*shape: int) -> Tensor:
    return torch.zeros(shape, device="meta")
