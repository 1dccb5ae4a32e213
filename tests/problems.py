"""What the tests of the operations share: forms of a problem, and checks of an implementation."""

from __future__ import annotations

import itertools

from torch import Tensor

from deltamem_kernels.testing import Problem, assert_close_to_float64, scan_problem

MODES = ("standard", "lambda_outside", "no_lambda")
NAMES = ("q", "k", "v", "beta", "decay", "initial_state")
GATES = [  # mode, decay of its own, beta per head, decay per head
    *itertools.product(("standard", "lambda_outside"), (False,), (False, True), (False,)),
    *itertools.product(("standard", "lambda_outside"), (True,), (False, True), (False, True)),
    *itertools.product(("no_lambda",), (False,), (False, True), (False,)),
]


def check(problem: Problem, implementation, **options) -> dict[str, Tensor]:
    """Check values and gradients on a backend against float64. See `assert_close_to_float64`."""
    if any(x.device.type != implementation.device for x in problem.operands.values()):
        problem = problem.to(implementation.device)
    return assert_close_to_float64(problem, implementation.backend, rounding=implementation.rounding, **options)


def subsets(names: tuple[str, ...], implementation) -> list[tuple[str, ...]]:
    """Return the subsets of the operands that require a gradient: of every size, or where a call takes long only of one
    operand and of all but one."""
    sizes = (1, len(names) - 1) if implementation.slow else range(1, len(names) + 1)
    return [s for n in sizes for s in itertools.combinations(names, n)]


def small(implementation, **options) -> Problem:
    """Return a problem with every operand, short where a token takes long."""
    sizes = {"T": 4, "R": 4, "H": 1, "B": 1} if implementation.slow else {"T": 70}
    return scan_problem(decay=True, device=implementation.device, **{**sizes, **options})


def leaves_of(problem: Problem) -> dict[str, Tensor]:
    """Return copies of the operands that require a gradient."""
    return {n: x.detach().clone().requires_grad_() for n, x in problem.operands.items()}
