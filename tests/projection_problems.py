"""Random problems for memory_projection, the float64 oracle, and the PyTorch that a layer would run."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from problems import FLOAT32_TOLERANCE, assert_close, fence
from torch import Tensor

from deltamem_kernels import memory_projection

NAMES = ("x", "qkv_weight", "beta_weight", "beta_bias", "decay_weight", "decay_bias")
RESULTS = ("q", "k", "v", "beta", "decay")
GATES = ("row", "head", None)  # of a weight's rows; without a weight there is no gate


def make(
    *lead: int,
    D: int = 40,
    H: int = 2,
    R: int = 8,
    beta: str = "row",
    decay: str | None = "row",
    biases: bool = True,
    dtype: torch.dtype | dict[str, torch.dtype] = torch.float32,
    fenced: bool = False,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Operands by name; x is [*lead, D], and some of its projections are large enough to saturate."""
    rows = {"row": H * R, "head": H}
    made = {"x": torch.randn(*lead, D), "qkv_weight": 2 * torch.randn(3 * H * R, D) / max(D, 1) ** 0.5}
    for name, gate in (("beta", beta), ("decay", decay)):
        if gate is not None:
            made[f"{name}_weight"] = torch.randn(rows[gate], D) / max(D, 1) ** 0.5
            if biases:
                made[f"{name}_bias"] = torch.randn(rows[gate])
    for name, y in made.items():
        y = y.to(dtype.get(name, torch.float32) if isinstance(dtype, dict) else dtype).to(device)
        made[name] = fence(y) if fenced else y
    return made


def plainly(
    x, qkv_weight, beta_weight, beta_bias=None, decay_weight=None, decay_bias=None, *, heads, normalize=True
) -> dict[str, Tensor]:
    """The operation as one writes it in PyTorch, in the operands' dtype."""
    q, k, v = (y.unflatten(-1, (heads, -1)) for y in F.linear(x, qkv_weight).chunk(3, dim=-1))
    if normalize:
        q, k = (F.normalize(torch.tanh(y), dim=-1, eps=1e-6) for y in (q, k))
    results = {"q": q, "k": k, "v": v}
    for name, weight, bias in (("beta", beta_weight, beta_bias), ("decay", decay_weight, decay_bias)):
        if weight is not None:
            gate = torch.sigmoid(F.linear(x, weight, bias))
            results[name] = gate.unflatten(-1, (heads, -1)) if len(weight) == v.shape[-2:].numel() else gate
    return results


def ours(backend: str | None, operands: dict[str, Tensor], **options) -> dict[str, Tensor]:
    operands = {"beta_bias": None, **operands}
    return {
        n: y for n, y in memory_projection(**operands, **options, backend=backend)._asdict().items() if y is not None
    }


def with_gradients(function, operands, cotangents, wanted=None, **options) -> dict[str, Tensor]:
    wanted = tuple(operands) if wanted is None else wanted
    leaves = {n: y.detach().requires_grad_(n in wanted) for n, y in operands.items()}
    out = function(**leaves, **options)
    used = [n for n in cotangents if out[n].requires_grad]
    grads = torch.autograd.grad(
        [out[n] for n in used],
        [leaves[n] for n in wanted],
        [cotangents[n].to(out[n].device, out[n].dtype) for n in used],
        materialize_grads=True,
    )
    return {**{n: y.detach() for n, y in out.items()}, **{f"d_{n}": g for n, g in zip(wanted, grads, strict=True)}}


def weights_of(results: dict[str, Tensor], fenced: bool = False) -> dict[str, Tensor]:
    """Random, and for the gates of one sign: a bias' gradient is their sum, and may be one number."""
    random = {n: torch.randn if n in ("q", "k", "v") else torch.rand for n in results}
    made = {n: random[n](y.shape, dtype=torch.float32) for n, y in results.items()}
    return {n: fence(y) for n, y in made.items()} if fenced else made


def exactly(operands, cotangents, wanted=None, **options) -> dict[str, Tensor]:
    """In float64, from the same rounded operands."""
    operands = {n: y.detach().double().cpu() for n, y in operands.items()}
    return with_gradients(plainly, operands, {n: y.double() for n, y in cotangents.items()}, wanted, **options)


def check(operands, implementation, *, fenced=False, wanted=None, tolerance=FLOAT32_TOLERANCE, **options) -> None:
    shapes = plainly(**{n: y.detach().double().cpu() for n, y in operands.items()}, **options)
    cotangents = weights_of(shapes, fenced)
    exact = exactly(operands, cotangents, wanted, **options)

    def call(**leaves):
        return ours(implementation.backend, leaves, **options)

    results = with_gradients(call, operands, cotangents, wanted)
    double = any(y.dtype == torch.float64 for y in operands.values())
    for name in shapes:
        assert results[name].dtype == (torch.float64 if double else torch.float32), name
        assert results[name].is_contiguous(), name
    for name in operands if wanted is None else wanted:
        assert results[f"d_{name}"].dtype == operands[name].dtype, name
    assert_close(results, exact, tolerance)
