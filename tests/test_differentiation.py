"""Differentiation beyond first-order gradients raises, for every operation on every backend."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, functional
from torch.utils.checkpoint import checkpoint

from deltamem_kernels import (
    attention_correction,
    attention_correction_norm_rope,
    delta_step,
    delta_update,
    memory_decode,
    memory_prefill,
    memory_projection,
    segment_mean,
)
from deltamem_kernels.compat import triton_affine_scan
from deltamem_kernels.nn import DeltaMemConfig, DeltaMemory

T, R, D = 3, 2, 4
FORWARD = "does not support forward-mode differentiation"
SECOND = "has first-order gradients only"

Operands = dict[str, Tensor]
Call = tuple[Callable[..., tuple], Operands]


def scan_operands() -> Operands:
    q, k, v = torch.randn(3, 1, T, 1, R)
    beta, decay = torch.rand(2, 1, T, 1, R)
    return {"q": q, "k": k, "v": v, "beta": beta, "decay": decay, "initial_state": torch.randn(1, 1, R, R)}


def affine() -> Call:
    names = ("q", "k", "v", "keep", "erase", "write")
    return triton_affine_scan, {"state": torch.randn(1, R, R), **dict(zip(names, torch.rand(6, 1, T, R), strict=True))}


def weights() -> Operands:
    made = {"qkv_weight": torch.randn(3 * R, D), "beta_weight": torch.randn(R, D), "beta_bias": torch.randn(R)}
    return made | {"decay_weight": torch.randn(R, D), "decay_bias": torch.randn(R)}


def prefill() -> Call:
    return memory_prefill, {"x": torch.randn(1, T, D), **weights(), "initial_state": torch.randn(1, 1, R, R)}


def correction(*lead: int) -> Operands:
    return {"base": torch.randn(*lead, D), "reads": torch.randn(*lead, 1, R), "weight": torch.randn(D, R)}


def plain_correction() -> Call:
    def call(**operands: Tensor) -> tuple:
        return (attention_correction(**operands),)

    return call, correction(1, T) | {"scale": torch.rand(()), "norm_weight": torch.rand(D)}


def norm_rope() -> Call:
    cos, sin = torch.randn(2, 1, T, 2)

    def call(**operands: Tensor) -> tuple:
        return (attention_correction_norm_rope(**operands, cos=cos, sin=sin, head_dim=2),)

    return call, correction(1, T) | {"scale": torch.rand(()), "norm_weight": torch.rand(2)}


def means() -> Call:
    ids = torch.tensor([[0, 1, 1]])
    return lambda x: segment_mean(x, ids, 2)[:1], {"x": torch.randn(1, T, D)}


class Read(torch.nn.Module):
    """`DeltaMemory.read` as a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = DeltaMemory(DeltaMemConfig(rank=R), D, dict.fromkeys("qkvo", D))

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        return self.memory.read(x, state)[:2]


def module() -> Call:
    read = Read()

    def call(x: Tensor, state: Tensor, **parameters: Tensor) -> tuple:
        return torch.func.functional_call(read, {f"memory.{n}": p for n, p in parameters.items()}, (x, state))

    parameters = {n: p.detach().clone() for n, p in read.memory.named_parameters() if not n.startswith("delta_")}
    return call, {"x": torch.randn(1, T, D), "state": torch.randn(1, 1, R, R), **parameters}


def step() -> Call:
    def call(**operands: Tensor) -> tuple:
        return (delta_step(**operands),)

    q, k, v, beta = torch.rand(4, 2, 1, R)
    return call, {"state": torch.randn(3, 1, R, R), "q": q, "k": k, "v": v, "beta": beta}


def decode() -> Call:
    base = {"base": torch.randn(2, D), "delta_weight": torch.randn(D, R)}
    return memory_decode, {"state": torch.randn(3, 1, R, R), "x": torch.randn(2, D), **weights(), **base}


DIFFERENTIABLE: dict[str, Callable[[], Call]] = {
    "delta_update": lambda: (delta_update, scan_operands()),
    "triton_affine_scan": affine,
    "memory_projection": lambda: (memory_projection, {"x": torch.randn(1, T, D), **weights()}),
    "memory_prefill": prefill,
    "attention_correction": plain_correction,
    "attention_correction_norm_rope": norm_rope,
    "segment_mean": means,
    "DeltaMemory": module,
}
EVERY: dict[str, Callable[[], Call]] = DIFFERENTIABLE | {"delta_step": step, "memory_decode": decode}


@pytest.fixture
def make(implementation, monkeypatch) -> Callable[[str], Call]:
    """Return an operation and its operands, which run on the implementation."""
    monkeypatch.setenv("DELTAMEM_BACKEND", implementation.backend)

    def make(operation: str, dtype: torch.dtype = torch.float32) -> Call:
        with torch.device(implementation.device):
            call, operands = EVERY[operation]()
        return call, {name: x.to(dtype) for name, x in operands.items()}

    return make


# Forward mode

TRANSFORMS: dict[str, Callable] = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "jacobian": lambda f, x: functional.jacobian(f, x, vectorize=True, strategy="forward-mode"),
    "jvp of vmap": lambda f, x: torch.func.jvp(torch.vmap(f), (x[None],), (torch.ones_like(x)[None],)),
    "jvp outside of jvp": lambda f, x: torch.func.jvp(
        lambda y: torch.func.jvp(lambda z: f(y), (x,), (x,)), (x,), (torch.ones_like(x),)
    ),
}
OVER_REVERSE: dict[str, Callable] = {
    "hessian": lambda f, x: torch.func.hessian(lambda y: f(y).square().sum())(x),
    "jvp of grad": lambda f, x: torch.func.jvp(torch.func.grad(lambda y: f(y).sum()), (x,), (torch.ones_like(x),)),
}


def of_one(call: Callable[..., tuple], operands: Operands, name: str) -> Callable[[Tensor], Tensor]:
    """The first result as a function of one operand."""
    return lambda x: call(**operands | {name: x})[0]


@pytest.mark.quick
@pytest.mark.one_isa
@pytest.mark.parametrize("operation", EVERY)
def test_forward_mode_raises(make, operation):
    """For a tangent of each operand, however it gets there. Nothing is written before."""
    call, operands = make(operation)
    call(**{name: x.clone() for name, x in operands.items()})  # from now on calls on a CPU take the fast path
    before = {name: x.clone() for name, x in operands.items()}
    for name, x in operands.items():
        f = of_one(call, operands, name)
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=FORWARD):
            f(forward_ad.make_dual(x, torch.ones_like(x)))
        with torch.no_grad(), forward_ad.dual_level(), pytest.raises(NotImplementedError, match=FORWARD):
            f(forward_ad.make_dual(x, torch.ones_like(x)))
        if operation in DIFFERENTIABLE:
            leaf = x.clone().requires_grad_()
            with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=FORWARD):
                f(forward_ad.make_dual(leaf, torch.ones_like(x)))
    for transform in (TRANSFORMS | OVER_REVERSE if operation in DIFFERENTIABLE else TRANSFORMS).values():
        with pytest.raises(NotImplementedError, match=FORWARD):
            transform(f, x)
    assert all(torch.equal(x, before[name]) for name, x in operands.items())


def test_a_tangent_of_out_raises():
    reads, weight, x = torch.randn(2, 1, R), torch.randn(D, R), torch.rand(2, 1, R)
    base, tangent = torch.randn(2, 2, D).unbind(0)
    with forward_ad.dual_level():
        out = forward_ad.make_dual(torch.zeros(2, D), tangent)
        with pytest.raises(NotImplementedError, match=FORWARD):
            attention_correction(base, reads, weight, out=out)
        out = forward_ad.make_dual(torch.zeros(2, 1, R), x)
        with pytest.raises(NotImplementedError, match=FORWARD):
            delta_step(torch.zeros(2, 1, R, R), x, x, x, x, out=out)


@pytest.mark.quick
@pytest.mark.one_isa
@pytest.mark.parametrize("operation", EVERY)
def test_operands_without_a_tangent_run_next_to_forward_mode(make, operation):
    call, operands = make(operation)
    w = torch.randn(3)

    def apart(w: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return (w * w).sum(), call(**{name: x.clone() for name, x in operands.items()})[0]

    plain = call(**{name: x.clone() for name, x in operands.items()})[0]
    with forward_ad.dual_level():
        _, result = apart(forward_ad.make_dual(w, w))
        torch.testing.assert_close(result, plain, rtol=0, atol=0)
    (_, result), (tangent, of_result) = torch.func.jvp(lambda w: apart(w * 1), (w,), (w,))
    torch.testing.assert_close(tangent, 2 * (w * w).sum())
    torch.testing.assert_close(result, plain, rtol=0, atol=0)
    assert not of_result.any()


@pytest.mark.parametrize("transform", ["jvp", "jacfwd"])
def test_compiled_forward_mode_raises(transform):
    operands = scan_operands()
    compiled = torch.compile(
        lambda v: TRANSFORMS[transform](of_one(delta_update, operands, "v"), v), backend="aot_eager"
    )
    with pytest.raises(Exception, match=FORWARD):
        compiled(operands["v"])
    torch._dynamo.reset()


# Second derivatives


def loss_of(results: tuple) -> Tensor:
    """Linear, so that the second derivative is that of the operation alone. The first has no other factor."""
    return sum((y * torch.linspace(-1, 2, y.numel(), device=y.device).view(y.shape)).sum() for y in results)


@pytest.mark.quick
@pytest.mark.one_isa
@pytest.mark.parametrize("operation", DIFFERENTIABLE)
def test_gradients_of_gradients_raise(make, operation):
    """Gradients with create_graph=True are those without. To differentiate them raises."""
    call, operands = make(operation)
    leaves = {name: x.requires_grad_() for name, x in operands.items()}
    (x, *_) = leaves.values()

    def gradients(**options: bool) -> tuple[Tensor, ...]:
        loss = loss_of(call(**leaves))
        # The gradient of segment_mean is constant without a factor that depends on x.
        return torch.autograd.grad(
            loss.square() if operation == "segment_mean" else loss, list(leaves.values()), **options
        )

    plain, recorded = gradients(), gradients(create_graph=True)
    for one, other in zip(plain, recorded, strict=True):
        assert one.any()
        assert torch.equal(one, other)
        assert not one.requires_grad
        for name, leaf in leaves.items():
            if (operation, name) == ("attention_correction", "base"):  # which no gradient depends on
                continue
            with pytest.raises(NotImplementedError, match=SECOND):
                torch.autograd.grad(other.sum(), leaf, retain_graph=True, allow_unused=True)
        with pytest.raises(NotImplementedError, match=SECOND):
            (x.sum() + other.sum()).backward(retain_graph=True)


@pytest.mark.quick
@pytest.mark.one_isa
@pytest.mark.parametrize("operation", DIFFERENTIABLE)
def test_gradients_of_the_gradient_of_one_operand_raise(make, operation):
    """Where the others are frozen, and some of them are not kept for backward."""
    call, operands = make(operation)
    for name in operands:
        leaf = operands[name].clone().requires_grad_()
        loss = loss_of(call(**operands | {name: leaf}))
        # These two results are linear in the operand: of a linear loss the gradient is constant.
        is_linear = (operation, name) in (("attention_correction", "base"), ("segment_mean", "x"))
        (g,) = torch.autograd.grad(loss.square() if is_linear else loss, leaf, create_graph=True)
        with pytest.raises(NotImplementedError, match=SECOND):
            torch.autograd.grad(g.sum(), leaf)


TWICE: dict[str, Callable] = {
    "hessian": lambda f, k: functional.hessian(lambda k: f(k).sum(), k),
    "hvp": lambda f, k: functional.hvp(lambda k: f(k).sum(), k, k),
    "vhp": lambda f, k: functional.vhp(lambda k: f(k).sum(), k, k),
    "jvp": lambda f, k: functional.jvp(f, k, k),
}


@pytest.mark.parametrize("function", TWICE)
def test_functions_that_differentiate_twice_raise(function):
    operands = scan_operands()
    with pytest.raises(NotImplementedError, match=SECOND):
        TWICE[function](of_one(delta_update, operands, "k"), operands["k"])


def test_a_gradient_penalty_raises_and_an_unused_graph_does_not():
    memory = Read()
    optimizer = torch.optim.SGD(memory.parameters(), lr=0.1)
    x = torch.randn(1, T, D, requires_grad=True)

    def output() -> Tensor:
        return loss_of(memory(x, torch.ones(1, 1, R, R)))

    (g,) = torch.autograd.grad(output(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=SECOND):
        (output() + g.square().sum()).backward()
    optimizer.zero_grad()
    used = [memory.memory.memory_k_proj, memory.memory.beta_proj]
    plain = torch.autograd.grad(output(), used)
    for p, g in zip(used, torch.autograd.grad(output(), used, create_graph=True), strict=True):
        p.grad = g
    for p, g in zip(used, plain, strict=True):
        assert torch.equal(p.grad, g)
    torch.nn.utils.clip_grad_norm_(used, 1e-3)
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in used]).norm().item(), 1e-3, rtol=1e-2, atol=0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    assert not used[0].grad.any()


# First derivatives


@pytest.mark.quick
@pytest.mark.one_isa
@pytest.mark.parametrize("operation", DIFFERENTIABLE)
def test_backward_twice_and_under_checkpointing_has_the_same_bits(make, operation):
    call, operands = make(operation)
    leaves = [x.requires_grad_() for x in operands.values()]
    loss = loss_of(call(**operands))
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    recomputed = loss_of(
        checkpoint(lambda *xs: call(**dict(zip(operands, xs, strict=True))), *leaves, use_reentrant=False)
    )
    third = torch.autograd.grad(recomputed, leaves, create_graph=True)
    for one, two, three in zip(first, second, third, strict=True):
        assert one.any()
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@pytest.mark.one_isa
@pytest.mark.parametrize("operation", DIFFERENTIABLE)
def test_gradients_are_those_of_finite_differences(make, implementation, operation):
    """In one random direction where kernels are emulated."""
    call, operands = make(operation, torch.float64)
    leaves = [x.requires_grad_() for x in operands.values()]
    assert torch.autograd.gradcheck(
        lambda *xs: tuple(call(**dict(zip(operands, xs, strict=True)))), leaves, fast_mode=implementation.slow
    )
