"""What the tests of the two forms of the correction share: the operation in plain PyTorch, and checks."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from deltamem_kernels.testing import CorrectionProblem, relative_error

NAMES = ("base", "reads", "weight", "scale", "norm_weight")


def plain_correction(
    base: Tensor,
    reads: Tensor,
    weight: Tensor,
    scale: float | Tensor = 1.0,
    *,
    head_dim: int = 0,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The operation in plain PyTorch as a layer of transformers would run it, each result in the operands' dtype."""

    def rms_norm(x: Tensor) -> Tensor:
        y = x.float()
        return norm_weight * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + norm_eps)).to(x.dtype)

    reads = reads if reads.ndim == base.ndim else reads.flatten(-2)
    delta = torch.nn.functional.linear(reads, weight) * scale
    if not head_dim:
        return base + (delta if norm_weight is None else rms_norm(delta))
    y = (base + delta).unflatten(-1, (-1, head_dim))
    y = y if norm_weight is None else rms_norm(y)
    if cos is not None:
        a, b = y.chunk(2, -1)
        y = y * cos.unsqueeze(-2) + torch.cat((-b, a), -1) * sin.unsqueeze(-2)
    return y.flatten(-2)


def check_16_bit(problem: CorrectionProblem, implementation) -> None:
    """Check that the error is at most twice that of plain PyTorch in the operands' dtype."""
    cotangents = problem.cotangents()
    exact = problem.float64(cotangents)
    ours = problem.run_with_gradients(implementation.backend, cotangents)
    theirs = replace(problem, operation=plain_correction).run_with_gradients(None, cotangents)
    for name, x in exact.items():
        if name != "d_scale":  # a single number: which of two roundings is closer says nothing
            assert relative_error(ours[name], x) <= 2 * relative_error(theirs[name], x), name
    off = abs(ours["d_scale"].item() - exact["d_scale"].item())
    assert off <= torch.finfo(ours["d_scale"].dtype).eps * problem.error_scale("d_scale", exact)


def check_rows_are_independent(problem: CorrectionProblem, implementation) -> None:
    """Check that a token has the same bits alone and among others, in its result and its gradients."""
    cotangent, by_token = problem.cotangents()["out"], ("base", "reads")
    together = problem.run_with_gradients(implementation.backend, {"out": cotangent}, by_token)
    T = cotangent.shape[1]
    for t in (0, 1, T // 2, T - 1):
        at = slice(t, t + 1)
        operands = {n: x[:, at] if n in by_token else x for n, x in problem.operands.items()}
        options = {n: x[:, at] if n in ("cos", "sin") else x for n, x in problem.options.items()}
        alone = replace(problem, operands=operands, options=options)
        results = alone.run_with_gradients(implementation.backend, {"out": cotangent[:, at]}, by_token)
        for name, x in results.items():
            assert torch.equal(x, together[name][:, at]), name


def check_runs_have_the_same_bits(problem: CorrectionProblem, implementation) -> None:
    """Check that every run has the same bits, on any number of threads."""
    cotangents = problem.cotangents()
    first = problem.run_with_gradients(implementation.backend, cotangents)
    threads = torch.get_num_threads()
    try:
        for n in (1,) if implementation.slow else (1, 2, 3):
            torch.set_num_threads(n)
            again = problem.run_with_gradients(implementation.backend, cotangents)
            assert all(torch.equal(again[name], x) for name, x in first.items()), n
    finally:
        torch.set_num_threads(threads)


def kept_for_backward(problem: CorrectionProblem, backend: str, wanted: tuple[str, ...]) -> list[Tensor]:
    """Return the tensors that a call keeps for backward: base, and those that are not operands."""
    leaves = {n: x.detach().requires_grad_(n in wanted) for n, x in problem.operands.items()}
    arguments = [*leaves.values(), *(x for x in problem.options.values() if isinstance(x, Tensor))]
    theirs = {x.untyped_storage().data_ptr() for x in arguments}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = problem.operation(**leaves, **problem.options, backend=backend)
    assert out.requires_grad
    assert kept, "not even the operands were kept"
    ours = [x for x in kept if x.untyped_storage().data_ptr() not in theirs]
    base = leaves["base"].untyped_storage().data_ptr()
    return ours + [x for x in kept if x.untyped_storage().data_ptr() == base]
