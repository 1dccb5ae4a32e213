"""Calls are checked once: one that looks like a call before is not looked at again. That must hide no mistake."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from deltamem_kernels import attention_correction, delta_step, memory_decode, memory_projection
from deltamem_kernels.backends import extension
from deltamem_kernels.ops import _checks

N, D, R = 3, 16, 4


def operands() -> dict:
    pool, x, base = torch.zeros(N, 1, R, R), torch.randn(N, D), torch.randn(N, 8)
    made = {"state": pool, "x": x, "qkv_weight": torch.randn(3 * R, D), "beta_weight": torch.randn(R, D)}
    made |= {"beta_bias": torch.randn(R), "base": base, "delta_weight": torch.randn(8, R), "out": base, "head_dim": 4}
    return made | {"cos": torch.randn(N, 4), "sin": torch.randn(N, 4), "scale": 0.5}


@pytest.fixture
def looked(monkeypatch) -> list[str]:
    """The operands that were looked at by name."""
    extension.library()
    extension._library("cpu")
    seen: list[str] = []
    check = _checks.check_fits
    for module in ("memory_decode", "memory_projection", "attention_correction_norm_rope"):
        monkeypatch.setattr(
            f"deltamem_kernels.ops.{module}.check_fits", lambda name, *rest: (seen.append(name), check(name, *rest))
        )
    return seen


def test_a_call_is_checked_once(looked):
    """Other values, other tensors: the same look. Another shape, dtype, stride or place is another look."""
    call = operands() | {"mode": "lambda_outside"}  # no other test calls with these
    with torch.no_grad():
        first = memory_decode(**call)
        assert looked
        del looked[:]
        other = operands() | {"mode": "lambda_outside"}
        before = other["state"].clone()
        second = memory_decode(**other)
        assert not looked
        assert second.corrected is other["out"]
        assert not torch.equal(other["state"], before)
        assert not torch.equal(first.reads, second.reads) or torch.count_nonzero(second.reads) == 0
        memory_decode(**call | {"x": torch.randn(D, N).T})
        assert looked


WRONG = {
    "another object in its place": lambda call: {"out": call["base"].view(N, 8)},
    "memory shared with an operand": lambda call: {"delta_weight": call["out"]._base[:, :R]},
    "shape": lambda call: {"cos": torch.randn(N, 6)},
    "dtype": lambda call: {"delta_weight": torch.zeros(8, R, dtype=torch.int32)},
    "device": lambda call: {"beta_bias": torch.zeros(R, device="meta")},
    "a number of another kind": lambda call: {"scale": "0.5"},
    "a mode": lambda call: {"mode": "fast"},
    "a truth for a number": lambda call: {"head_dim": True},
    "a truth for a slot": lambda call: {"pad_slot_id": True},
    "gradients": lambda call: {"x": call["x"].requires_grad_()},
}


@pytest.mark.parametrize("what", WRONG)
def test_a_mistake_after_a_good_call(what):
    """Each differs from the call before in one thing."""
    extension.library()
    extension._library("cpu")
    call = operands()
    if what == "memory shared with an operand":  # of the same sizes and strides where it is right
        call = {name: x for name, x in call.items() if name not in ("head_dim", "cos", "sin")}
        call |= {"out": torch.empty(8, 8)[:N], "delta_weight": torch.zeros(8, 8)[:, :R]}
    with torch.no_grad():
        memory_decode(**call)
        memory_decode(**call)
    change = WRONG[what](call)
    before = call["state"].clone()
    with torch.set_grad_enabled(what == "gradients"), pytest.raises((ValueError, TypeError)):
        memory_decode(**call | change)
    assert torch.equal(call["state"], before)


@pytest.mark.parametrize(
    "change",
    [{"pad_slot_id": True}, {"update_state": 1}, {"out": "q"}, {"state": torch.zeros(1, 1, R, R).expand(N, 1, R, R)}],
    ids=lambda change: next(iter(change)),
)
def test_a_mistake_after_a_good_step(change):
    extension.library()
    extension._library("cpu")
    call = {name: torch.rand(N, 1, R) for name in ("q", "k", "v", "beta", "out")}
    call |= {"state": torch.zeros(N, 1, R, R), "pad_slot_id": 1, "update_state": True}
    with torch.no_grad():
        delta_step(**call)
        delta_step(**call)
        before = call["state"].clone()
        with pytest.raises((ValueError, TypeError)):
            delta_step(**call | {name: call[x] if isinstance(x, str) else x for name, x in change.items()})
    assert torch.equal(call["state"], before)


def test_gradients_after_a_call_without():
    x, weights = torch.randn(2, 3, D), (torch.randn(3 * R, D), torch.randn(R, D), None)
    with torch.no_grad():
        memory_projection(x, *weights)
        assert not memory_projection(x.requires_grad_(), *weights).q.requires_grad
    assert memory_projection(x, *weights).q.requires_grad


def test_what_is_written_is_seen_by_autograd():
    """Past the dispatcher, a tensor written in place still has another version."""
    weight = torch.randn(8, R, requires_grad=True)
    base, reads = torch.randn(N, 8), torch.randn(N, R)
    product = (base * weight[:N, :1]).sum()
    with torch.no_grad():
        attention_correction(base, reads, weight, out=base)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_a_step_is_seen_by_autograd():
    pool, weight = torch.randn(N, 1, R, R), torch.randn(N, 1, R, R, requires_grad=True)
    product = (pool * weight).sum()
    with torch.no_grad():
        delta_step(pool, *torch.rand(4, N, 1, R))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_fakes_and_maps_are_nobodys_memory():
    """What has no numbers, or stands for several, goes through the dispatcher."""
    weights = torch.randn(3 * R, D), torch.randn(R, D), torch.zeros(R)
    with torch.no_grad():
        mode = FakeTensorMode()
        fakes = [mode.from_tensor(x) for x in (torch.randn(2, D), *weights)]
        assert memory_projection(*fakes).q.shape == (2, 1, R)
        graph = make_fx(lambda x, *w: memory_projection(x, *w), tracing_mode="symbolic")(torch.randn(2, D), *weights)
        assert any("memory_projection" in str(node.target) for node in graph.graph.nodes)
        base, reads, weight = torch.randn(5, N, 8), torch.randn(5, N, R), torch.randn(8, R)
        mapped = torch.vmap(attention_correction, in_dims=(0, 0, None))(base, reads, weight)
        assert torch.allclose(mapped, attention_correction(base, reads, weight), atol=1e-5)


def test_as_many_calls_as_there_are(monkeypatch):
    """What is kept of calls has an end."""
    extension.library()
    extension._library("cpu")
    monkeypatch.setattr(_checks, "_MOST_CALLS", 4)
    checked: set[bytes] = set()
    times: list[int] = []
    with torch.no_grad():
        for size in (*range(7), 6):
            _checks.check_once(checked, lambda x: times.append(x.shape[0]), torch.zeros(size))
    assert times == list(range(7))
    assert len(checked) <= 4
