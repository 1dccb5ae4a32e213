"""delta_update under autograd: autocast, shared operands, checkpointing, second derivatives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from problems import NAMES, leaves_of, small
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from deltamem_kernels import delta_update
from deltamem_kernels.testing import FLOAT32_TOLERANCE, assert_close_in_norm, relative_error

pytestmark = pytest.mark.each_scan


@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast_does_not_reach_the_arithmetic_of_the_state(implementation, backward_inside):
    """q, k and v come from a linear layer in bfloat16, the gate is float32. Autocast must not round the state."""
    T = 4 if implementation.slow else 70
    x = torch.randn(2, T, 16, device=implementation.device)
    projection, gate = (torch.nn.Linear(16, n, device=implementation.device) for n in (24, 8))

    def gradients(scan: Callable) -> dict[str, Tensor]:
        with torch.autocast(implementation.device, torch.bfloat16):
            q, k, v = projection(x).unflatten(-1, (3, 2, 4)).unbind(2)
            beta = gate(x).float().sigmoid().unflatten(-1, (2, 4))
            assert (q.dtype, beta.dtype) == (torch.bfloat16, torch.float32)
            reads, final_state = scan(q, k, v, beta)
            assert (reads.dtype, final_state.dtype) == (torch.bfloat16, torch.float32)
        loss = reads.float().square().sum() + final_state.square().sum()
        parameters = {f"{n}.{m}": p for n, x in (("qkv", projection), ("beta", gate)) for m, p in x.named_parameters()}
        with torch.autocast(implementation.device, torch.bfloat16, enabled=backward_inside):
            grads = torch.autograd.grad(loss, list(parameters.values()))
        return {"reads": reads, "final_state": final_state, **dict(zip(parameters, grads, strict=True))}

    def exactly(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        reads, final_state = delta_update(*(y.double() for y in (q, k, v, beta)), backend="reference")
        return reads.to(q.dtype), final_state.float()

    ours = gradients(lambda *operands: delta_update(*operands, backend=implementation.backend))
    exact = gradients(exactly)
    assert all(torch.isfinite(y).all() for y in ours.values())
    assert relative_error(ours["final_state"], exact["final_state"]) <= FLOAT32_TOLERANCE
    # Four roundings to bfloat16 lie on the way to a weight: the reads, their gradient, that of q, k and v, the product.
    # A last bit that falls the other way in one goes through all that follow.
    assert_close_in_norm(ours, exact, 4 * torch.finfo(torch.bfloat16).eps)


def test_gradients_of_two_calls_with_the_same_operands_add_up(implementation):
    """No call changes the buffers of the other."""
    problem = small(implementation)
    leaves, weights = leaves_of(problem), problem.cotangents()
    separate = []
    for mode in ("standard", "lambda_outside"):
        out = delta_update(**leaves, mode=mode, backend=implementation.backend)
        separate.append(torch.autograd.grad(out, list(leaves.values()), list(weights.values())))
    both = [
        delta_update(**leaves, mode=mode, backend=implementation.backend) for mode in ("standard", "lambda_outside")
    ]
    together = torch.autograd.grad([*both[0], *both[1]], list(leaves.values()), [*weights.values()] * 2)
    for name, g, one, other in zip(leaves, together, *separate, strict=True):
        assert torch.equal(g, one + other), name


def test_backward_twice_has_the_same_bits(implementation):
    """With retain_graph: backward does not change what was kept for it."""
    problem = small(implementation)
    leaves, weights = leaves_of(problem), problem.cotangents()
    out = delta_update(**leaves, backend=implementation.backend)
    grads = [
        torch.autograd.grad(out, list(leaves.values()), list(weights.values()), retain_graph=True) for _ in range(2)
    ]
    for name, first, second in zip(leaves, *grads, strict=True):
        assert torch.equal(first, second), name


def test_backward_accumulates_into_grad(implementation):
    problem = small(implementation)
    leaves = leaves_of(problem)
    for _ in range(2):
        delta_update(**leaves, backend=implementation.backend).reads.sum().backward()
    grads = torch.autograd.grad(
        delta_update(**leaves, backend=implementation.backend).reads.sum(), list(leaves.values())
    )
    for (name, x), g in zip(leaves.items(), grads, strict=True):
        assert torch.equal(x.grad, 2 * g), name


def test_a_second_derivative_raises(implementation):
    """It is not silently zero."""
    leaves = leaves_of(small(implementation))
    reads, _ = delta_update(**leaves, backend=implementation.backend)
    (g,) = torch.autograd.grad(reads.square().sum(), leaves["v"], create_graph=True)
    with pytest.raises(NotImplementedError, match="first-order gradients only"):
        g.sum().backward()


def test_gradients_with_strides_of_zero_are_exact(implementation):
    """sum() returns such a gradient. The operands are results of other operators."""
    problem = small(implementation)
    leaves = leaves_of(problem)
    reads, state = delta_update(**{n: x * 1 for n, x in leaves.items()}, backend=implementation.backend)
    (reads.sum() + state.sum()).backward()
    ones = {"reads": torch.ones_like(reads), "final_state": torch.ones_like(state)}
    plain = problem.run_with_gradients(implementation.backend, ones)
    for name, x in leaves.items():
        assert torch.equal(x.grad, plain[f"d_{name}"]), name


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_has_the_same_bits(implementation, use_reentrant):
    """The state is an argument and a result, so a recomputed block is the same."""
    problem = small(implementation)
    weight = torch.randn(problem.operands["q"].shape[-1:] * 2, device=implementation.device)

    def block(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        k = torch.nn.functional.normalize(torch.tanh(k @ weight), dim=-1)
        reads, state = delta_update(q, k, v, beta, decay, initial_state=state, backend=implementation.backend)
        return reads.tanh(), state

    def gradients(run: Callable) -> list[Tensor]:
        leaves = leaves_of(problem)
        q, *rest, state = leaves.values()
        for _ in range(2):  # the second block goes on from the first one's state
            q, state = run(q, *rest, state)
        return list(torch.autograd.grad(q.square().sum() + state.square().sum(), list(leaves.values())))

    def recomputed(*operands: Tensor) -> tuple[Tensor, Tensor]:
        return checkpoint(block, *operands, use_reentrant=use_reentrant)

    if use_reentrant:  # refuses torch.autograd.grad
        leaves = leaves_of(problem)
        q, *rest, state = leaves.values()
        for _ in range(2):
            q, state = recomputed(q, *rest, state)
        (q.square().sum() + state.square().sum()).backward()
        again = [x.grad for x in leaves.values()]
    else:
        again = gradients(recomputed)
    for name, plain, other in zip(NAMES, gradients(block), again, strict=True):
        assert torch.equal(plain, other), name


def test_a_call_without_gradients_has_the_same_bits(implementation):
    """Under no_grad and in inference mode."""
    problem = small(implementation, mask=True)
    leaves = leaves_of(problem)
    recorded = delta_update(**leaves, **problem.options, backend=implementation.backend)
    with torch.no_grad():
        plain = delta_update(**leaves, **problem.options, backend=implementation.backend)
    with torch.inference_mode():
        inference = delta_update(**leaves, **problem.options, backend=implementation.backend)
    assert all(x.requires_grad for x in recorded)
    assert not any(x.requires_grad for x in (*plain, *inference))
    for x, y, z in zip(recorded, plain, inference, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x, z)
