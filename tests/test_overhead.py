"""What a call costs beside the arithmetic, on the smallest problem there is: checks, dispatch, autograd. Times are
shown, not judged; `--benchmark-compare` sets them beside those of another revision, and --benchmark-disable runs each
once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deltamem_kernels import delta_update, memory_decode, memory_projection, segment_mean
from deltamem_kernels.compat import triton_affine_scan

R = 8


def token(*shape: int, gradients: bool = False) -> Tensor:
    return torch.rand(shape).requires_grad_(gradients)


def operands(gradients: bool, heads: bool = True) -> dict[str, Tensor]:
    """One token of one sequence."""
    shape = (1, 1, 1, R) if heads else (1, 1, R)
    return {name: token(*shape, gradients=gradients) for name in ("q", "k", "v", "beta")}


def options(*names: str) -> dict[str, Tensor]:
    """Operands that need not be there."""
    made = {
        "decay": token(1, 1, 1, R),
        "initial_state": token(1, 1, R, R),
        "mask": torch.ones(1, 1, dtype=torch.bool),
        "cu_seqlens": torch.tensor([0, 1]),
    }
    return {name: made[name] for name in names}


CALLS: dict[str, Callable[[bool], dict[str, Tensor]]] = {
    "plain": operands,
    "without-heads": lambda gradients: operands(gradients, heads=False),
    "initial_state": lambda gradients: operands(gradients) | options("initial_state"),
    "mask": lambda gradients: operands(gradients) | options("mask"),
    "packed": lambda gradients: operands(gradients) | options("cu_seqlens"),
    "everything": lambda gradients: operands(gradients) | options("decay", "initial_state", "mask", "cu_seqlens"),
}


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("form", CALLS)
@pytest.mark.benchmark(group="overhead of a call")
def test_forward(benchmark, form, gradients):
    call = CALLS[form](gradients)
    reads, final_state = benchmark(lambda: delta_update(**call))
    assert reads.shape == call["q"].shape
    assert reads.requires_grad is final_state.requires_grad is gradients


@pytest.mark.benchmark(group="overhead of a call")
@pytest.mark.parametrize("form", CALLS)
def test_forward_and_backward(benchmark, form):
    call = CALLS[form](True)
    leaves = [x for x in call.values() if x.requires_grad]
    cotangent = torch.ones_like(call["q"])
    grads = benchmark(lambda: torch.autograd.grad(delta_update(**call).reads, leaves, cotangent))
    assert grads[0].shape == call["q"].shape


@pytest.mark.benchmark(group="overhead of a call")
@pytest.mark.parametrize("backend", [None, "cpu"])
def test_the_choice_of_a_backend(benchmark, backend):
    call = operands(gradients=False)
    assert benchmark(lambda: delta_update(**call, backend=backend)).reads.count_nonzero() == 0  # of a state of zeros


@pytest.mark.benchmark(group="overhead of a call")
def test_compat(benchmark):
    state, x = token(1, R, R), token(1, 1, R)
    state_out, reads = benchmark(lambda: triton_affine_scan(state, x, x, x, x, x, x))
    assert (state_out.shape, reads.shape) == (state.shape, x.shape)


@pytest.mark.benchmark(group="overhead of a call")
@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
def test_memory_projection(benchmark, gradients):
    x, weights = token(1, 1, 16), [token(n, 16, gradients=gradients) for n in (3 * R, R)]
    p = benchmark(lambda: memory_projection(x, *weights, None))
    assert p.q.shape == (1, 1, 1, R)
    assert p.q.requires_grad is gradients


@pytest.mark.benchmark(group="overhead of a call")
def test_segment_mean(benchmark):
    x, ids = token(1, 1, 16), torch.zeros(1, 1, dtype=torch.int64)
    assert torch.equal(benchmark(lambda: segment_mean(x, ids, 1)).means, x)


@pytest.mark.benchmark(group="overhead of a call")
@pytest.mark.parametrize("corrected", [False, True])
def test_memory_decode(benchmark, corrected):
    """SmolLM2-135M's sizes: all of a step up to the query, with its rotary."""
    pool, x, weights = token(4, 1, R, R), token(1, 576), [token(n, 576) for n in (3 * R, R)]
    options = {"base": x, "delta_weight": token(576, R), "out": token(1, 576)}
    options |= {"head_dim": 64, "cos": token(1, 64), "sin": token(1, 64)}
    with torch.inference_mode():
        step = benchmark(lambda: memory_decode(pool, x, *weights, None, **(options if corrected else {})))
    assert step.reads.shape == (1, 1, R)
    assert step.corrected is (options["out"] if corrected else None)
