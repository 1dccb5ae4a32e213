"""deltamem_kernels.testing: its comparisons fail when a result is wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from deltamem_kernels import testing

PROBLEMS = {
    "scan": lambda **options: testing.scan_problem(T=5, decay=True, mask=True, **options),
    "packed scan": lambda **options: testing.scan_problem(lengths=(2, 0, 3), **options),
    "projection": lambda **options: testing.projection_problem(2, 3, **options),
    "split projection": lambda **options: testing.projection_problem(2, 3, split=True, **options),
    "correction": lambda **options: testing.correction_problem(norm=True, **options),
    "correction of heads": lambda **options: testing.correction_problem(head_dim=6, rope=True, **options),
    "segment mean": lambda **options: testing.segment_problem(2, 20, 3, 3, mask=True, **options),
}


def wrong(problem: testing.Problem, change) -> testing.Problem:
    """Return the problem with an operation whose first result is changed."""

    def operation(**call):
        results = problem.operation(**call)
        if call["backend"] != "cpu":  # the float64 result, and the shapes on the meta device
            return results
        if isinstance(results, Tensor):
            return change(results)
        return results._replace(**{results._fields[0]: change(results[0])})

    return replace(problem, operation=operation)


@pytest.mark.parametrize("fenced", [False, True])
@pytest.mark.parametrize("kind", PROBLEMS)
def test_right_results_pass(kind, fenced):
    problem = PROBLEMS[kind](fenced=fenced)
    ours = testing.assert_close_to_float64(problem, "cpu")
    assert ours.keys() >= {f"d_{name}" for name in problem.operands}
    assert all(x.count_nonzero() for name, x in ours.items() if x.is_floating_point()), "a comparison of zeros"


@pytest.mark.parametrize("kind", PROBLEMS)
def test_results_and_gradients_that_are_off_by_a_thousandth_fail(kind):
    problem = PROBLEMS[kind]()
    with pytest.raises(AssertionError, match=r"relative errors: .*1\.0e-03"):
        testing.assert_close_to_float64(wrong(problem, lambda x: 1.001 * x), "cpu")
    with pytest.raises(AssertionError, match=r"relative errors: .*d_"):
        testing.assert_close_to_float64(wrong(problem, lambda x: x.detach() + 1.001 * (x - x.detach())), "cpu")


@pytest.mark.parametrize("change", [lambda x: x * float("nan"), lambda x: x.double(), lambda x: x[:1]])
def test_nan_another_dtype_and_another_shape_fail(change):
    """autograd raises a RuntimeError for a gradient of another shape."""
    with pytest.raises((AssertionError, RuntimeError)):
        testing.assert_close_to_float64(wrong(testing.scan_problem(T=3), change), "cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_results_may_be_off_by_their_rounding_alone(dtype):
    problem = testing.correction_problem(scale=1.0, dtype=dtype)
    testing.assert_close_to_float64(problem, "cpu")
    with pytest.raises(AssertionError, match="relative errors"):
        testing.assert_close_to_float64(problem, "cpu", rounding={})


def test_the_error_of_zeros_is_zero_or_infinite():
    zeros = torch.zeros(3)
    assert testing.relative_error(zeros, zeros) == 0
    assert testing.relative_error(zeros + 1e-30, zeros.double()) == float("inf")
    assert testing.relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0])) == pytest.approx(34**-0.5)


def test_a_number_between_nans_keeps_its_value_and_has_nan_around_it():
    x = torch.randn(2, 3)
    inside = testing.between_nans(x)
    assert torch.equal(inside, x)
    assert not inside.is_contiguous()
    parent = inside._base if inside._base is not None else inside
    assert parent.isnan().sum() == parent.numel() - x.numel() > 0
