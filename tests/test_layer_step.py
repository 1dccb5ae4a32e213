"""layer_step, all that a memory does for a token: every backend against the single operations in float64."""

from __future__ import annotations

import pytest
import torch
from layer_problems import D, parameters
from problems import MODES
from torch import Tensor

from deltamem_kernels import attention_correction, delta_step, memory_decode, memory_projection
from deltamem_kernels.operands import LayerStepOperands, LayerStepWeights
from deltamem_kernels.ops.layer_step import layer_step
from deltamem_kernels.testing import FLOAT32_TOLERANCE, between_nans, relative_error

pytestmark = pytest.mark.one_isa
B, OUT = 5, (12, 70, 31)


def problem(H: int, R: int, mode: str, *, gains=False, norm=False, mask=True, state=True, token=True, split=True):
    """Return random operands."""
    made = parameters(H, R, mode != "no_lambda" and R != 4, R == 5, split=split)
    shape = (B, 1, D) if token else (B, D)
    weights = LayerStepWeights(
        made["qkv_weight"] if split else [made["qkv_weight"]],
        *(made.get(name) for name in ("beta_weight", "beta_bias", "decay_weight", "decay_bias")),
        [torch.randn(out, H * R) for out in OUT],
        [torch.rand(()) + 0.5 for _ in OUT] if gains else [],
        torch.randn(OUT[-1]) if norm else None,
        H,
        True,
        mode,
        1.0 if gains else 2.0,
        1e-6,
    )
    given = torch.tensor([True, False, True, True, False]).view(shape[:-1]) if mask else None
    return LayerStepOperands(torch.randn(shape), torch.randn(B, H, R, R) if state else None, given, weights)


def moved(o: LayerStepOperands, change) -> LayerStepOperands:
    def apply(x):
        if isinstance(x, LayerStepWeights):
            return LayerStepWeights(*map(apply, x))
        if isinstance(x, (list, tuple)):
            return [apply(y) for y in x]
        return change(x) if isinstance(x, Tensor) else x

    return LayerStepOperands(*map(apply, o))


def exact(o: LayerStepOperands) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return reads, states and corrections from the single operations in float64."""
    o = moved(o, lambda x: x.detach().cpu().double() if x.is_floating_point() else x.cpu())
    w = o.weights
    qkv = tuple(w.qkv_weight) if len(w.qkv_weight) == 3 else w.qkv_weight[0]
    p = memory_projection(o.x.view(B, D), qkv, *w[1:5], heads=w.heads, backend="reference")
    rank = p.q.shape[-1]
    state = torch.zeros(B, w.heads, rank, rank, dtype=torch.float64) if o.state is None else o.state.clone()
    slots = torch.arange(B) if o.mask is None else torch.where(o.mask.view(B), torch.arange(B), -1)
    reads = delta_step(state, *p, mode=w.mode, state_indices=slots, backend="reference")
    corrections = []
    for index, weight in enumerate(w.delta_weights):
        scale = w.gains[index] if w.gains else w.scale
        norm = w.norm_weight if weight is w.delta_weights[-1] else None
        base = torch.zeros(B, weight.shape[0], dtype=torch.float64)
        corrections.append(attention_correction(base, reads, weight, scale, norm_weight=norm, backend="reference"))
    return reads, state, corrections


def assert_exact(ours, wanted, rounding=0.0):
    for x, y in zip((ours[0], ours[1], *ours[2]), (wanted[0], wanted[1], *wanted[2]), strict=True):
        assert relative_error(x.flatten(), y.flatten()) <= FLOAT32_TOLERANCE + rounding


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("H", "R", "split"), [(1, 8, True), (2, 4, False), (3, 5, True), (1, 17, False)])
@pytest.mark.parametrize("form", [{}, {"gains": True}, {"norm": True}, {"mask": False, "token": False}], ids=str)
def test_steps_are_exact(implementation, mode, H, R, split, form):
    """Some rows masked, operands between NaN."""
    o = problem(H, R, mode, split=split, **form)
    wanted = exact(o)
    fenced = moved(o, lambda x: between_nans(x.to(implementation.device)) if x.ndim else x.to(implementation.device))
    ours = layer_step(*fenced, backend=implementation.backend)
    assert_exact(ours, wanted)
    token = (B, 1) if o.x.ndim == 3 else (B,)
    assert ours.reads.shape == (*token, H, R)
    assert [tuple(x.shape) for x in ours.corrections] == [(*token, out) for out in OUT]
    assert torch.equal(fenced.state.cpu(), o.state)  # the given state is not written
    if o.mask is not None:
        assert torch.equal(ours.state[1].cpu(), o.state[1])
        assert torch.count_nonzero(ours.reads[1]) == 0


@pytest.mark.each_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_steps_are_exact_in_every_dtype_of_the_model(implementation, dtype):
    """The weights are float32, and the state starts from zeros or from a float32 state."""
    for state in (True, False):
        o = problem(2, 4, "standard", state=state)._replace(x=torch.randn(B, 1, D).to(dtype))
        if dtype == torch.float64 and state:
            o = o._replace(state=o.state.double())
        ours = layer_step(*moved(o, lambda x: x.to(implementation.device)), backend=implementation.backend)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert {x.dtype for x in (ours.reads, ours.state, *ours.corrections)} == {wide}
        assert_exact(ours, exact(o))


@pytest.mark.each_isa
def test_a_step_has_the_bits_of_the_single_operations_and_of_its_row_alone():
    for form in ({}, {"gains": True, "norm": True}, {"state": False}):
        o = problem(1, 8, "lambda_outside", mask=False, **form)
        ours = layer_step(*o, backend="cpu")
        state = torch.zeros(B, 1, 8, 8) if o.state is None else o.state.clone()
        w = o.weights
        reads, _ = memory_decode(state, o.x, tuple(w.qkv_weight), *w[1:5], mode=w.mode, backend="cpu")
        assert torch.equal(ours.reads, reads)
        assert torch.equal(ours.state, state)
        for index, weight in enumerate(w.delta_weights):
            norm = w.norm_weight if index == 2 else None
            base, scale = torch.randn(B, 1, weight.shape[0]), w.gains[index] if w.gains else w.scale
            corrected = attention_correction(base, reads, weight, scale, norm_weight=norm, backend="cpu")
            assert torch.equal(base + ours.corrections[index], corrected)
        for row in range(B):
            part = slice(row, row + 1)
            alone = o._replace(x=o.x[part], state=None if o.state is None else o.state[part])
            one = layer_step(*alone, backend="cpu")
            assert torch.equal(one.state, ours.state[part])
            assert all(torch.equal(x, y[part]) for x, y in zip(one.corrections, ours.corrections, strict=True))


def test_no_sequences_and_no_corrections_are_fine(implementation):
    o = problem(1, 8, "standard", mask=False)
    none = o._replace(weights=o.weights._replace(delta_weights=[], norm_weight=None))
    assert layer_step(*moved(none, lambda x: x.to(implementation.device)), backend=implementation.backend)[2] == ()
    empty = moved(o._replace(x=o.x[:0], state=o.state[:0]), lambda x: x.to(implementation.device))
    ours = layer_step(*empty, backend=implementation.backend)
    assert ours.state.shape == (0, 1, 8, 8)
    assert [x.shape[0] for x in ours.corrections] == [0, 0, 0]


def of(o: LayerStepOperands, **changes) -> dict:
    return {"weights": o.weights._replace(**changes)}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: {"x": o.x.expand(B, 2, D)}, r"x must be \[B, D\] or \[B, 1, D\]"),
        (lambda o: {"state": o.state[:2]}, r"state must be \[B, H, R, R\]"),
        (lambda o: {"mask": o.mask.float()}, "mask must be a bool tensor"),
        (lambda o: {"mask": o.mask[:2]}, "mask must be"),
        (
            lambda o: of(o, delta_weights=[torch.randn(9, 3)], gains=[]),
            r"\[out, H·R\] with H·R = 8",
        ),
        (lambda o: of(o, gains=o.weights.gains[:1]), "gains must be empty or 3 tensors, got 1"),
        (lambda o: of(o, norm_weight=torch.randn(3)), r"norm_weight must be \[out\]"),
        (lambda o: of(o, delta_weights=[], gains=[]), "None without corrections"),
        (lambda o: of(o, norm_eps=-1.0), "norm_eps must be at least 0"),
        (lambda o: of(o, mode="fast"), "mode must be"),
        (lambda o: {"x": o.x.requires_grad_()}, "layer_step has no gradient"),
    ],
)
def test_operands_that_do_not_fit_raise(backend, change, message):
    o = problem(1, 8, "standard", gains=True, norm=True)
    with pytest.raises((TypeError, ValueError), match=message):
        layer_step(*o._replace(**change(o)), backend=backend)
