"""The cost of a call besides its arithmetic, on the smallest problem: checks, dispatch, autograd.

Times are shown, not judged: `--benchmark-compare` compares them with those of another revision, and
`--benchmark-disable` runs each call once. The results of the timed calls are checked."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deltamem_kernels import delta_update, memory_decode, memory_projection, segment_mean
from deltamem_kernels.compat import triton_affine_scan
from deltamem_kernels.testing import (
    Problem,
    assert_close_in_norm,
    memory_operands,
    projection_problem,
    projection_weights,
)
from deltamem_kernels.testing.problem import Results

R = 8


def token(*shape: int, gradients: bool = False) -> Tensor:
    return torch.rand(shape).requires_grad_(gradients)


def operands(gradients: bool, heads: bool = True) -> dict[str, Tensor]:
    """One token of one sequence, from a state that is not zero."""
    made = memory_operands((1, 1, 1) if heads else (1, 1), R)
    made["initial_state"] = token(1, 1, R, R) if heads else token(1, R, R)
    return {name: x.requires_grad_(gradients) for name, x in made.items()}


def options(*names: str) -> dict[str, Tensor]:
    """Optional operands."""
    made = {
        "decay": token(1, 1, 1, R),
        "mask": torch.ones(1, 1, dtype=torch.bool),
        "cu_seqlens": torch.tensor([0, 1]),
    }
    return {name: made[name] for name in names}


CALLS: dict[str, Callable[[bool], dict[str, Tensor]]] = {
    "initial_state": operands,
    "plain": lambda gradients: {n: x for n, x in operands(gradients).items() if n != "initial_state"},
    "without-heads": lambda gradients: operands(gradients, heads=False),
    "mask": lambda gradients: operands(gradients) | options("mask"),
    "packed": lambda gradients: operands(gradients) | options("cu_seqlens"),
    "everything": lambda gradients: operands(gradients) | options("decay", "mask", "cu_seqlens"),
}


def in_float64(call: dict[str, Tensor]) -> Results:
    """The results of delta_update in float64."""
    names = ("q", "k", "v", "beta", "decay", "initial_state")
    rest = {name: x for name, x in call.items() if name not in names}
    return Problem(delta_update, {n: call[n] for n in names if n in call}, rest).float64({}, ())


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("form", CALLS)
@pytest.mark.benchmark(group="overhead of a call")
def test_a_timed_forward_gives_the_right_result(benchmark, form, gradients):
    call = CALLS[form](gradients)
    out = benchmark(lambda: delta_update(**call))
    assert out.reads.requires_grad is out.final_state.requires_grad is gradients
    assert_close_in_norm(out._asdict(), in_float64(call))


@pytest.mark.benchmark(group="overhead of a call")
@pytest.mark.parametrize("form", CALLS)
def test_a_timed_backward_gives_the_right_gradients(benchmark, form):
    call = CALLS[form](True)
    leaves = {name: x for name, x in call.items() if x.requires_grad}
    cotangents = {name: torch.rand_like(x, dtype=torch.float32) for name, x in in_float64(call).items()}
    grads = benchmark(
        lambda: torch.autograd.grad(list(delta_update(**call)), list(leaves.values()), list(cotangents.values()))
    )
    rest = {name: x for name, x in call.items() if name not in leaves}
    exact = Problem(delta_update, leaves, rest).float64(cotangents)
    ours = {f"d_{name}": g for name, g in zip(leaves, grads, strict=True)}
    assert_close_in_norm(ours, {name: exact[name] for name in ours})


@pytest.mark.benchmark(group="overhead of a call")
@pytest.mark.parametrize("backend", [None, "cpu"])
def test_a_timed_choice_of_the_backend_gives_the_right_result(benchmark, backend):
    call = operands(gradients=False)
    out = benchmark(lambda: delta_update(**call, backend=backend))
    assert_close_in_norm(out._asdict(), in_float64(call))


@pytest.mark.benchmark(group="overhead of a call")
def test_a_timed_affine_scan_gives_the_right_result(benchmark):
    """With all gates and vectors one tensor x: reads = S x, and S = x S + (x² − x S x) xᵀ by rows."""
    S, x = token(1, R, R), token(1, 1, R)
    state_out, reads = benchmark(lambda: triton_affine_scan(S, x, x, x, x, x, x))
    y, T = x.double().view(R, 1), S.double()[0]
    torch.testing.assert_close(reads.view(R, 1).double(), T @ y, rtol=1e-5, atol=1e-6)
    expected = y * T + (y * y - y * (T @ y)) @ y.T
    torch.testing.assert_close(state_out[0].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.benchmark(group="overhead of a call")
@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
def test_a_timed_projection_gives_the_right_result(benchmark, gradients):
    problem = projection_problem(1, 1, D=16, H=1, R=R, decay=None, biases=False)
    x, qkv, beta = problem.operands.values()
    qkv.requires_grad_(gradients)
    p = benchmark(lambda: memory_projection(x, qkv, beta, None))
    assert p.q.requires_grad is gradients
    assert_close_in_norm({n: y for n, y in p._asdict().items() if y is not None}, problem.float64({}, ()))


@pytest.mark.benchmark(group="overhead of a call")
def test_a_timed_segment_mean_gives_the_right_result(benchmark):
    x, ids = token(1, 1, 16), torch.zeros(1, 1, dtype=torch.int64)
    assert torch.equal(benchmark(lambda: segment_mean(x, ids, 1)).means, x)


@pytest.mark.benchmark(group="overhead of a call")
@pytest.mark.parametrize("corrected", [False, True])
def test_a_timed_decoding_step_gives_the_right_result(benchmark, corrected):
    """The sizes are those of SmolLM2-135M: a step up to the query, with its rotary embedding. Each call changes the
    state, so a further one is compared."""
    weights = list(projection_weights(576, 1, R, decay=None, biases=False).values())
    pool, x = token(4, 1, R, R), torch.randn(1, 576)
    options = {"base": x, "delta_weight": torch.randn(576, R), "out": token(1, 576)}
    options |= {"head_dim": 64, "cos": token(1, 64), "sin": token(1, 64)}
    call = (x, *weights, None)
    with torch.inference_mode():
        step = benchmark(lambda: memory_decode(pool, *call, **(options if corrected else {})))
        assert step.corrected is (options["out"] if corrected else None)
        before = pool.clone()
        last = memory_decode(pool, *call, **(options if corrected else {}))
        double = [x.double() for x in call[:-1]]
        wide = {n: x.double() if isinstance(x, Tensor) else x for n, x in options.items() if n != "out"}
        exact = memory_decode(before.double(), *double, None, **(wide if corrected else {}), backend="reference")
    assert_close_in_norm({"reads": last.reads}, {"reads": exact.reads})
    if corrected:
        assert_close_in_norm({"corrected": last.corrected}, {"corrected": exact.corrected})
