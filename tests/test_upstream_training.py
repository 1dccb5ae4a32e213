"""Layers of the δ-mem authors' package after `patch`: training in steps, gradient checkpointing, the state's dtype."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from deltamem_kernels.integrations.upstream import patch, unpatch
from deltamem_kernels.testing import FLOAT32_TOLERANCE, relative_error

HIDDEN = 6


class Model(torch.nn.Module):
    """A stack of the authors' layers, which may be checkpointed as transformers does it."""

    def __init__(self, authors, depth: int = 2) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(authors["core.delta"].DeltaMemAttention() for _ in range(depth))

    def forward(self, x, *, checkpointed: bool = False, position=None):
        position = x.new_full((), 0.3) if position is None else position
        for layer in self.layers:
            call = [x, (position, position)]
            x = x + (checkpoint(layer, *call, use_reentrant=False) if checkpointed else layer(*call))[0]
        return x

    def write(self, enabled: bool) -> None:
        for layer in self.layers:
            layer.write_enabled = enabled

    def detach(self, *, reset: bool) -> None:
        for layer in self.layers:
            layer.delta_state = None if reset else layer.delta_state.detach()


def gradients(model: Model) -> torch.Tensor:
    found = torch.cat([p.grad.flatten() for p in model.parameters()]).clone()
    model.zero_grad()
    return found


def train(model: Model, inputs, *, checkpointed: bool, reset: bool, by_hand: bool = False) -> list[torch.Tensor]:
    """Train in steps: a call that writes, one that writes further, and one that only reads; then backward.

    The layers' settings change between the calls and before backward, as they do in the authors' training.
    """
    steps = []
    for step in inputs:
        if reset or (by_hand and steps):
            model.detach(reset=reset)
        outputs = []
        for x, write in zip(step, (True, True, False), strict=True):
            model.write(write)
            outputs.append(model(x, checkpointed=checkpointed))
        model.write(True)
        sum(y.square().mean() for y in outputs).backward()
        steps.append(gradients(model))
    return steps


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("checkpointed", [True, False])
def test_patched_layers_train_in_steps(authors, checkpointed, reset):
    """Gradients are those of the formulas in float64, without checkpoints, and with the states detached by hand."""
    model = Model(authors)
    inputs = torch.randn(3, 3, 2, 12, HIDDEN)
    exact = train(copy.deepcopy(model).double(), inputs.double(), checkpointed=False, reset=reset, by_hand=True)
    patch()
    for ours, wanted in zip(train(model, inputs, checkpointed=checkpointed, reset=reset), exact, strict=True):
        assert relative_error(ours, wanted) <= FLOAT32_TOLERANCE


def test_checkpointing_does_not_change_a_bit_and_leaves_no_trace(authors):
    patch()
    model, inputs = Model(authors), torch.randn(2, 3, 2, 12, HIDDEN)
    plain, other = copy.deepcopy(model), copy.deepcopy(model)
    expected = train(plain, inputs, checkpointed=False, reset=False)
    for ours, wanted in zip(train(other, inputs, checkpointed=True, reset=False), expected, strict=True):
        assert torch.equal(ours, wanted)
    for ours, wanted in zip(other.layers, plain.layers, strict=True):
        assert torch.equal(ours.delta_state, wanted.delta_state)
        assert ours.delta_state.any()
        assert ours.write_enabled


def test_a_loss_of_the_states_alone_trains_in_steps(authors):
    patch()
    model = Model(authors)
    for x in torch.randn(2, 2, 9, HIDDEN):
        model(x)
        sum(layer.delta_state.square().sum() for layer in model.layers).backward()
        assert model.layers[1].projections.grad.any()


def test_history_is_kept_while_the_graph_is(authors):
    """With retain_graph, the second step goes back through the first, as in the authors' code."""
    model = Model(authors)
    x, y = torch.randn(2, 2, 9, HIDDEN)

    def two_steps(model, dtype):
        model(x.to(dtype)).square().mean().backward(retain_graph=True)
        model.zero_grad()
        model(y.to(dtype)).square().mean().backward()
        return gradients(model)

    exact = two_steps(copy.deepcopy(model).double(), torch.float64)
    patch()
    assert relative_error(two_steps(model, torch.float32), exact) <= FLOAT32_TOLERANCE


def test_a_repeated_call_that_is_not_known_raises(authors):
    model, x, position = Model(authors), torch.randn(2, 5, HIDDEN), torch.ones(())
    loss = model(x, checkpointed=True).sum()
    patch()
    with pytest.raises(RuntimeError, match=r"does not know which call .* the first call must come after patch"):
        loss.backward()
    model.detach(reset=True)
    loss = sum(model(x, checkpointed=True, position=position).sum() for _ in range(2))
    with pytest.raises(RuntimeError, match="calls of the model must not share their position_embeddings"):
        loss.backward()


def test_states_of_earlier_calls_are_released(authors):
    patch()
    model, x = Model(authors), torch.randn(2, 5, HIDDEN)
    with torch.no_grad():
        model(x)
        state = weakref.ref(model.layers[0].delta_state)
        model(x)
    gc.collect()
    assert state() is None
    model(x, checkpointed=True).sum().backward()
    state = weakref.ref(model.layers[0].delta_state)
    model(x, checkpointed=True).sum().backward()
    gc.collect()
    assert state() is None
    layer = weakref.ref(model.layers[0])
    del model
    gc.collect()
    assert layer() is None


# The dtype of the state


@torch.no_grad()
def in_calls(layer, x, tokens: int):
    """Return the outputs and the last state of calls of so many tokens."""
    layer.delta_state, position = None, torch.ones((), dtype=x.dtype)
    return torch.cat(
        [layer(part, (position.clone(), position))[0] for part in x.split(tokens, 1)], 1
    ), layer.delta_state


@pytest.mark.parametrize("scan_impl", ["auto", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_state_is_not_rounded_between_calls(authors, dtype, scan_impl):
    layer, x = authors["core.delta"].DeltaMemAttention().to(dtype), torch.randn(3, 70, HIDDEN).to(dtype)
    layer.scan_impl = scan_impl
    patch()
    rounded, once = (in_calls(layer, x, tokens)[1] for tokens in (1, 70))
    assert {rounded.dtype, once.dtype} == {dtype}
    if scan_impl == "auto":
        assert relative_error(rounded.float(), once.float()) > 5 * FLOAT32_TOLERANCE
    unpatch()
    patch(state_dtype=torch.float32)
    outputs, once = in_calls(layer, x, 70)
    assert (outputs.dtype, once.dtype) == (dtype, torch.float32)
    for tokens in (1, 3):
        stepped, state = in_calls(layer, x, tokens)
        assert state.dtype == torch.float32
        assert relative_error(state, once) <= FLOAT32_TOLERANCE
        # a read near the middle of two numbers may be rounded to either of them, and is then multiplied once more
        assert relative_error(stepped, outputs) <= torch.finfo(dtype).eps / 4
    layer.write_enabled, layer.delta_state = False, once
    q = torch.randn(3, 2, 4).to(dtype)
    reads = layer._token_state_reads(once, q, None, None)
    assert reads.dtype == dtype
    assert relative_error(reads.double(), q.double() @ once.double().mT) <= torch.finfo(dtype).eps
    assert layer(x, (torch.ones((), dtype=dtype),))[0].dtype == dtype
    assert layer.delta_state is once


def test_a_wider_model_keeps_its_own_dtype(authors):
    patch(state_dtype=torch.float32)
    layer, x = authors["core.delta"].DeltaMemAttention().double(), torch.randn(2, 5, HIDDEN).double()
    assert in_calls(layer, x, 5)[1].dtype == torch.float64
    unpatch()
    patch(state_dtype=torch.float64)
    assert in_calls(layer.bfloat16(), x.bfloat16(), 5)[1].dtype == torch.float64


def test_a_state_from_before_the_patch_is_converted(authors):
    layer, x = authors["core.delta"].DeltaMemAttention().bfloat16(), torch.randn(2, 5, HIDDEN).bfloat16()
    before = in_calls(layer, x, 5)[1]
    patch(state_dtype=torch.float32)
    layer.write_enabled = False
    with torch.no_grad():
        layer(x, (torch.ones(()).bfloat16(),))
    assert layer.delta_state.dtype == torch.float32
    assert torch.equal(layer.delta_state, before.float())
    assert before.any()


def test_a_loaded_state_is_not_rounded(authors):
    model = Model(authors).bfloat16()
    state = {f"layers.{i}": torch.randn(2, 4, 4) for i in range(2)}
    authors["runtime.session"].load(model, state)
    assert model.layers[0].delta_state.dtype == torch.bfloat16
    patch(state_dtype=torch.float32)
    authors["runtime.session"].load(model, state)
    for name, tensor in state.items():
        assert torch.equal(model.get_submodule(name).delta_state, tensor)
