"""Helpers for tests of code that calls this package: random problems, their float64 results, and comparisons.

    from deltamem_kernels import testing

    problem = testing.scan_problem(B=2, T=100, H=4, R=16, mode="lambda_outside", device="cuda")
    testing.assert_close_to_float64(problem, "triton")

Nothing here needs pytest.
"""

from .comparison import (
    FLOAT32_TOLERANCE,
    ROUNDING,
    assert_close_in_norm,
    assert_close_to_float64,
    relative_error,
)
from .correction import CorrectionProblem, correction_problem
from .problem import Problem, between_nans
from .projection import projection_problem, projection_weights
from .scan import memory_operands, scan_problem
from .segments import segment_problem

__all__ = [
    "FLOAT32_TOLERANCE",
    "ROUNDING",
    "CorrectionProblem",
    "Problem",
    "assert_close_in_norm",
    "assert_close_to_float64",
    "between_nans",
    "correction_problem",
    "memory_operands",
    "projection_problem",
    "projection_weights",
    "relative_error",
    "scan_problem",
    "segment_problem",
]
