"""Comparison of results with those in float64, by the norm of the difference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .problem import Problem, Results

FLOAT32_TOLERANCE = 2e-5
"""The largest ‖ours − float64‖ / ‖float64‖ that the package promises for results and gradients in float32."""
ROUNDING = {torch.bfloat16: 0.5, torch.float16: 0.5}
"""The error, in last bits, of rounding a 16-bit result once to the nearest number."""


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """Return ‖ours − exact‖ / ‖exact‖ in float64. Where exact is zero, return 0 if ours is too, else infinity."""
    ours, exact = ours.detach().double().cpu(), exact.detach().double().cpu()
    assert ours.shape == exact.shape, f"shape {list(ours.shape)}, not {list(exact.shape)}"
    return _quotient((ours - exact).norm().item(), exact.norm().item())


def _quotient(distance: float, scale: float) -> float:
    return distance / scale if scale > 0 else (0.0 if distance == 0 else float("inf"))


def assert_close_in_norm(ours: Results, exact: Results, tolerance: float = FLOAT32_TOLERANCE) -> None:
    """Assert that each tensor of `exact` is within `tolerance` of the one of `ours` with the same name, in
    `relative_error`. NaN is not close to anything."""
    errors = {name: relative_error(ours[name], exact[name]) for name in exact}
    wrong = {name: f"{error:.1e}" for name, error in errors.items() if not error <= tolerance}
    assert not wrong, f"relative errors over {tolerance}: {wrong}"


def assert_close_to_float64(
    problem: Problem,
    backend: str | None = None,
    *,
    tolerance: float = FLOAT32_TOLERANCE,
    wanted: tuple[str, ...] | None = None,
    cotangents: Results | None = None,
    oracle: Callable[..., Any] | None = None,
    rounding: Mapping[torch.dtype, float] = ROUNDING,
) -> Results:
    """Assert that results and gradients on a backend are those in float64, and that a gradient has the shape and dtype
    of its operand.

    Args:
        problem: the call. Its tensors are used as they are, on their device and with their strides.
        backend: as in the operation.
        tolerance: of the relative error. A result in 16 bits may be off by its rounding in addition.
        wanted: the operands that require a gradient; None means all.
        cotangents: gradients of the results; None makes random ones.
        oracle: the operation as plain PyTorch; None means the operation itself on the backend "reference".
        rounding: in last bits, by dtype. 0.5 is rounding to the nearest number, 1 is truncation.

    Returns:
        What the backend computed, for further checks.
    """
    cotangents = problem.cotangents() if cotangents is None else cotangents
    exact = problem.float64(cotangents, oracle=oracle)
    ours = problem.run_with_gradients(backend, cotangents, wanted)
    for name, x in problem.shapes().items():
        assert (ours[name].shape, ours[name].dtype) == (x.shape, x.dtype), name
    for name in problem.operands if wanted is None else wanted:
        gradient, like = ours[f"d_{name}"], problem.operands[name]
        assert (gradient.shape, gradient.dtype) == (like.shape, like.dtype), f"d_{name}"
    wrong = {}
    for name, x in ours.items():
        if not x.is_floating_point():
            assert torch.equal(x.cpu(), exact[name]), name
            continue
        distance = (x.double().cpu() - exact[name]).norm().item()
        error = _quotient(distance, problem.error_scale(name, exact))
        limit = tolerance + rounding.get(x.dtype, 0.0) * torch.finfo(x.dtype).eps
        if not error <= limit:
            wrong[name] = f"{error:.1e} (at most {limit:.1e})"
    assert not wrong, f"relative errors: {wrong}"
    return ours
