"""`MemoryCall(statistics=True)`."""

from __future__ import annotations

import pytest
import torch
from models import CLOSE, logits, one_thread, remembering, tokens
from transformers import DynamicCache

from deltamem_kernels.integrations.transformers import MemoryCall, memory_layers
from deltamem_kernels.testing import relative_error

__all__ = ["one_thread"]

MODES = {
    "coupled": ({}, lambda beta, decay: 1 - beta),
    "free": ({"couple_lambda": False, "rankwise_gates": False, "num_state_heads": 2}, lambda beta, decay: decay),
    "outside": ({"state_update_mode": "lambda_outside"}, lambda beta, decay: 1 - beta),
    "none": ({"state_update_mode": "no_lambda"}, lambda beta, decay: torch.ones_like(beta)),
}


def watch(model):
    """Return what the attention modules read, and the outputs of the projections before their correction."""
    seen = {index: {} for index in range(len(model.model.layers))}
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        attention.register_forward_pre_hook(
            lambda m, a, k, index=index: seen[index].update(x=k["hidden_states"]), with_kwargs=True
        )
        for head in "qkvo":
            projection = getattr(attention, f"{head}_proj")
            projection.register_forward_pre_hook(
                lambda m, a, index=index, head=head: seen[index].update(
                    {head: torch.nn.functional.linear(a[0], m.weight, m.bias)}
                )
            )
    return seen


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("mode", MODES)
def test_statistics_are_those_of_the_operations(kind, mode):
    """For a padded prompt and for a step of decoding. They do not change the result."""
    fields, keep_of = MODES[mode]
    model = remembering(kind, **fields)
    ids, mask = tokens(2, 7), torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    exact = logits(model, ids, attention_mask=mask)
    cache, seen = DynamicCache(config=model.config), watch(model)
    for part, whole in ((ids, mask), (ids[:, :1], torch.cat([mask, torch.ones(2, 1)], 1))):
        with MemoryCall(model, statistics=True) as call:
            ours = logits(model, part, attention_mask=whole, cache=cache)
        if part is ids:
            assert relative_error(ours, exact) <= CLOSE
        assert call.statistics.keys() == {0, 1}
        real = whole[:, -part.shape[1] :].bool()
        for index, found in call.statistics.items():
            memory = model.model.layers[index].self_attn.delta_memory
            projected = memory._project(seen[index]["x"])
            assert relative_error(found.beta, projected.beta) <= CLOSE
            assert relative_error(found.beta_mean, projected.beta[real].mean()) <= CLOSE
            kept = keep_of(projected.beta, projected.decay)[real].mean()
            assert relative_error(found.keep_mean, kept) <= CLOSE
            norms = call.states[index].flatten(2).norm(dim=-1)
            assert relative_error(found.state_norm, norms) <= CLOSE
            assert found.correction_ratio.keys() == set("qkvo")
        if part is ids:  # the state before the call is zero
            reads = memory.read(seen[1]["x"], mask=real).reads
            for head, ratio in found.correction_ratio.items():
                base = seen[1][head]
                correction = memory.correct(base, reads, head) - base
                assert relative_error(ratio, (correction[real].norm() / base[real].norm())) <= 1e-4


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_penalty_on_beta_reaches_the_gates(checkpointed):
    model, ids = remembering(), tokens(2, 6)
    model.train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    with MemoryCall(model, statistics=True) as call:
        loss = model(ids, labels=ids, use_cache=False).loss
    penalty = sum(layer.beta_mean for layer in call.statistics.values())
    bias = [layer.delta_memory.beta_bias for _, layer in memory_layers(model)]
    both = torch.autograd.grad(loss + penalty, bias, retain_graph=True)
    plain = torch.autograd.grad(loss, bias)
    for index, (x, y) in enumerate(zip(both, plain, strict=True)):
        beta = call.statistics[index].beta.detach()
        of_bias = (beta * (1 - beta)).mean((0, 1)).flatten() / beta[0, 0].numel()
        if index == 1:  # the last layer's bias has no other way to its own β; the first layer's has one to the second's
            assert relative_error(x - y, of_bias) <= 1e-3
        assert (x - y).any()


def test_messages_have_the_statistics_of_their_means():
    model, ids = remembering(memory_write_granularity="message_mean"), tokens(1, 6)
    seen = watch(model)
    with MemoryCall(model, message_ids=torch.tensor([[0, 0, 0, 1, 1, -1]]), statistics=True) as call:
        logits(model, ids, use_cache=False)
    x = seen[0]["x"]
    means = torch.stack([x[:, :3].mean(1), x[:, 3:5].mean(1)], 1)
    exact = model.model.layers[0].self_attn.delta_memory._project(means).beta
    assert relative_error(call.statistics[0].beta, exact) <= CLOSE
    with MemoryCall(model, write=False, statistics=True) as call:
        logits(model, ids, use_cache=False)
    assert call.statistics[0].beta is None
    assert call.statistics[0].keep_mean is None
    with MemoryCall(model) as call, pytest.warns(UserWarning, match="no ids were given"):
        logits(model, ids, use_cache=False)
    assert call.statistics == {}
    with pytest.raises(TypeError, match="statistics must be True or False"):
        MemoryCall(model, statistics="all")
