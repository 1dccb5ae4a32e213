"""The context of a call reaches attention through wrapped layers, checkpointing, compilation and copies."""

from __future__ import annotations

import copy
import functools
import io
import pickle

import pytest
import torch
from models import CLOSE, DROPPING, TRANSFORMERS_5, one_thread, remembering, tokens
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (  # noqa: PLC2701
    CheckpointImpl,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from deltamem_kernels.integrations.transformers import (
    MemoryCall,
    attach_memory,
    detach_memory,
    get_memory,
    memory_layers,
)
from deltamem_kernels.integrations.transformers.cache_keyword import cache_keyword
from deltamem_kernels.integrations.transformers.extending import Extension
from deltamem_kernels.nn import DeltaMemConfig
from deltamem_kernels.testing import relative_error

__all__ = ["one_thread"]

KINDS = ["llama", "qwen3", *DROPPING]
compiled = functools.partial(torch.compile, backend="aot_eager")
reentrant = functools.partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.REENTRANT)
WRAPPERS = {"compile": compiled, "checkpoint": checkpoint_wrapper, "reentrant": reentrant}
WRAPPERS["both"] = lambda layer: checkpoint_wrapper(compiled(layer))


def wrap_layers(model, wrap) -> None:
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = wrap(layer)


def wrapped(kind, how, before):
    """Return a model with a memory, and one with the same weights whose layers are wrapped, before or
    after attaching."""
    plain = remembering(kind)
    other = copy.deepcopy(plain)
    if before:
        memories = [layer.delta_memory for _, layer in memory_layers(other)]
        detach_memory(other)
        wrap_layers(other, WRAPPERS[how])
        attach_memory(other, memories[0].config)
        for (_, layer), memory in zip(memory_layers(other), memories, strict=True):
            layer.delta_memory.load_state_dict(memory.state_dict())
    else:
        wrap_layers(other, WRAPPERS[how])
    return plain.train(), other.train()


def run(model, ids, states=None, **more):
    """Return logits and gradients of a call whose backward comes after the MemoryCall."""
    embeddings = model.model.embed_tokens(ids).detach().requires_grad_()
    model.zero_grad()
    if states is None:
        logits = model(inputs_embeds=embeddings, use_cache=False, **more).logits
    else:
        with MemoryCall(model, states):
            logits = model(inputs_embeds=embeddings, use_cache=False, **more).logits
    weights = [p for _, layer in memory_layers(model) for p in layer.delta_memory.parameters()]
    logits.square().sum().backward()
    return [logits.detach(), embeddings.grad, *(p.grad for p in weights)]


def assert_close(ours, exact):
    assert all(grad.any() for grad in exact)
    for x, y in zip(ours, exact, strict=True):
        assert relative_error(x, y) <= CLOSE


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("how", WRAPPERS)
@pytest.mark.parametrize("kind", KINDS)
def test_wrapped_layers_give_what_plain_layers_give(kind, how, before):
    """Packed rows, and states of a MemoryCall that has ended before backward."""
    plain, other = wrapped(kind, how, before)
    ids = tokens(1, 12)
    packed = {"position_ids": torch.cat([torch.arange(n) for n in (5, 7)])[None]}
    states = {index: torch.randn(1, 1, 8, 8) for index in (0, 1)}
    for given in ({}, packed):
        exact = run(plain, ids, states, **given)
        assert_close(run(other, ids, states, **given), exact)
        assert relative_error(run(plain, ids, **given)[0], exact[0]) > 1e-3  # the states make a difference


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_layers_give_what_plain_layers_give(kind, use_reentrant):
    plain = remembering(kind).train()
    other = copy.deepcopy(plain)
    other.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    ids, states = tokens(1, 12), {index: torch.randn(1, 1, 8, 8) for index in (0, 1)}
    packed = {"position_ids": torch.cat([torch.arange(n) for n in (5, 7)])[None]}
    for given in ({}, packed):
        assert_close(run(other, ids, states, **given), run(plain, ids, states, **given))
    assert_close(run(other, ids), run(plain, ids))


@pytest.mark.parametrize("kind", KINDS if TRANSFORMERS_5 else ["llama", "qwen3"])
def test_packed_sequences_do_not_leak(kind):
    """In transformers 4 they leak in the attention of the other models."""
    model, parts = remembering(kind), [tokens(1, n) for n in (5, 1, 6)]
    positions = torch.cat([torch.arange(x.shape[1]) for x in parts])[None]
    with torch.no_grad():
        packed = model(torch.cat(parts, 1), position_ids=positions, use_cache=False).logits
        alone = torch.cat([model(x, use_cache=False).logits for x in parts], 1)
    assert relative_error(packed, alone) <= CLOSE


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_model_is_right_or_raises(use_reentrant):
    """Its recomputation is right inside the MemoryCall of its forward, and raises outside of it or in another one."""
    model = remembering().train()
    ids, other = tokens(1, 9), tokens(1, 9)
    states, more = ({index: torch.randn(1, 1, 8, 8) for index in (0, 1)} for _ in range(2))
    weight = model.model.layers[0].self_attn.delta_memory.memory_v_proj

    def loss(ids, checkpointed=True):
        def call(embeddings):
            return model(inputs_embeds=embeddings, use_cache=False).logits.square().sum()

        embeddings = model.model.embed_tokens(ids).detach().requires_grad_()
        return checkpoint(call, embeddings, use_reentrant=use_reentrant) if checkpointed else call(embeddings)

    def gradient(value):
        weight.grad = None
        value.backward()
        return weight.grad

    assert relative_error(gradient(loss(ids)), gradient(loss(ids, False))) <= CLOSE  # before any MemoryCall
    with MemoryCall(model, states):
        exact = gradient(loss(ids, False))
        assert relative_error(gradient(loss(ids)), exact) <= CLOSE
        value = loss(ids)
    with pytest.raises(RuntimeError, match="recomputed in backward outside of its MemoryCall"):
        value.backward()
    with MemoryCall(model, states):
        first = loss(ids)
    with MemoryCall(model, more), pytest.raises(RuntimeError, match="outside of its MemoryCall"):
        (first + loss(other)).backward()
    plain = gradient(loss(ids, False))
    assert relative_error(gradient(loss(ids)), plain) <= CLOSE  # after all MemoryCalls


def test_a_checkpointed_attention_raises_after_a_memory_call():
    model, ids = remembering().train(), tokens(1, 9)
    states = {index: torch.randn(1, 1, 8, 8) for index in (0, 1)}
    exact = run(model, ids)
    for layer in model.model.layers:
        layer.self_attn = checkpoint_wrapper(layer.self_attn)
    assert_close(run(model, ids), exact)
    with pytest.raises(RuntimeError, match="recomputed in backward without its layer"):
        run(model, ids, states)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ZeroDivisionError])
def test_an_interrupted_call_ends(error):
    model, ids = remembering(), tokens(1, 6)
    attention = model.model.layers[0].self_attn

    def interrupt(*_):
        raise error

    x = torch.randn(1, 3, 64)
    before = attention.q_proj(x)
    hook = attention.o_proj.register_forward_pre_hook(interrupt)
    with pytest.raises(error):
        model(ids)
    hook.remove()
    assert torch.equal(attention.q_proj(x), before)
    assert model(ids).logits.isfinite().all()


@pytest.mark.parametrize("how", ["pickle", "torch.save", "deepcopy"])
def test_copies_remember_as_the_model_does(how):
    model, ids = remembering("qwen3"), tokens(1, 9)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    states = {index: torch.randn(1, 1, 8, 8) for index in (0, 1)}
    assert [x.equal(y) for x, y in zip(run(other, ids, states), run(model, ids, states), strict=True)].count(False) == 0
    with MemoryCall(model, states):
        inside = model(ids, use_cache=False).logits
        assert not torch.equal(other(ids, use_cache=False).logits, inside)  # the call is that of the other model
    detach_memory(other)
    assert not any(isinstance(module, Extension) for module in other.modules())
    assert [type(a) for a in other.modules()] == [
        getattr(type(b), "original_class", type(b)) for b in model.modules() if type(b).__name__ != "DeltaMemory"
    ]


def test_classes_keep_their_names_and_signatures():
    """Libraries look for layers by the name of their class, and for arguments in signatures."""
    import inspect

    plain, model = remembering(), remembering()
    detach_memory(plain)
    for name, module in plain.named_modules():
        other = model.get_submodule(name)
        assert (type(other).__name__, type(other).__module__) == (type(module).__name__, type(module).__module__)
        assert isinstance(other, type(module))
        if not isinstance(module, torch.nn.ModuleList):
            assert inspect.signature(other.forward) == inspect.signature(module.forward)


@pytest.mark.parametrize("value", [-1e9, -65504.0, -1e4, -float("inf"), torch.finfo(torch.float32).min])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_additive_masks_of_any_size_mask_padding(kind, value):
    model, ids = remembering(kind), tokens(2, 8)
    real = torch.arange(8)[None] >= torch.tensor([[0], [3]])
    allowed = torch.ones(8, 8).tril().bool() & real[:, None, :]
    if value == -float("inf"):
        allowed |= torch.eye(8).bool() & torch.tensor([True, False])[:, None, None]
    additive = torch.zeros(2, 1, 8, 8).masked_fill(~allowed[:, None], value)
    positions = (real.long().cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        exact = model(ids[1:, 3:]).logits[0]
        ours = model(ids, attention_mask=additive, position_ids=positions).logits[1, 3:]
    assert relative_error(ours, exact) <= CLOSE


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_gaps_in_positions_do_not_restart_the_memory_under_a_given_mask(kind):
    model, ids = remembering(kind), tokens(1, 9)
    causal = torch.ones(1, 1, 9, 9).tril().bool()
    gaps = torch.tensor([[0, 1, 2, 10, 11, 12, 20, 21, 22]])
    with torch.no_grad():
        ours = model(ids, attention_mask=causal, position_ids=gaps, use_cache=False).logits
        # with a cache positions never restart the memory
        exact = model(ids, attention_mask=causal, position_ids=gaps, use_cache=True).logits
        assert relative_error(ours, exact) <= CLOSE
        packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
        apart = causal & (torch.arange(9)[:, None] // 4 == torch.arange(9) // 4) | causal & (torch.arange(9) == 8)
        first = torch.arange(9) < 4
        apart = causal & (first[:, None] == first)
        ours = model(ids, attention_mask=apart, position_ids=packed, use_cache=False).logits
        alone = torch.cat([model(part, use_cache=False).logits for part in ids.split([4, 5], dim=1)], 1)
    assert relative_error(ours, alone) <= CLOSE


def test_continuous_batching_raises_when_it_is_called():
    model = remembering()
    for call in (
        lambda: model.generate_batch([[1, 2, 3]]),
        lambda: model.init_continuous_batching(),
        lambda: model.continuous_batching_context_manager(),
    ):
        with pytest.raises(ValueError, match="do not support a memory"):
            call()
    detach_memory(model)
    assert "generate_batch" not in vars(type(model))


def test_saving_the_model_warns(tmp_path):
    model = remembering()
    with pytest.warns(UserWarning, match=r"from_pretrained does not load them: save the memory with save_adapter"):
        model.save_pretrained(tmp_path)
    detach_memory(model)
    model.save_pretrained(tmp_path)  # no warning, which is an error in tests


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@torch.no_grad()
def test_a_model_with_a_memory_compiles_in_one_graph(kind):
    """Prefill and decoding, with a cache that is given and with one that the model creates; inside a MemoryCall too."""
    torch.compiler.reset()
    model, ids = remembering(kind), tokens(2, 12)
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    exact = model(ids, use_cache=False).logits
    assert relative_error(whole(ids, use_cache=False).logits, exact) <= CLOSE
    cache = DynamicCache(config=model.config)
    parts = [whole(part, cache=cache).logits for part in ids.split([5, *[1] * 7], dim=1)]
    assert relative_error(torch.cat(parts, 1), exact) <= CLOSE
    states = {index: torch.randn(2, 1, 8, 8) for index in (0, 1)}
    with MemoryCall(model, states) as call:
        ours = whole(ids, use_cache=False).logits
    found = call.states
    with MemoryCall(model, states) as call:
        assert relative_error(ours, model(ids, use_cache=False).logits) <= CLOSE
    assert relative_error(ours, exact) > 1e-3
    assert found.keys() == call.states.keys() == {0, 1}
    assert all(relative_error(found[index], state) <= CLOSE for index, state in call.states.items())


def test_a_replaced_forward_raises():
    model, ids = remembering(), tokens(1, 6)
    attention = model.model.layers[1].self_attn
    attention.forward = attention.original_class.forward.__get__(attention)
    with pytest.raises(ValueError, match="the forward of a LlamaAttention was replaced by another library"):
        model(ids)
    del attention.forward
    assert model(ids).logits.isfinite().all()


@torch.no_grad()
def test_arguments_of_attention_by_position_are_found():
    model, x = remembering(), torch.randn(2, 6, 64)
    attention = model.model.layers[0].self_attn
    rotary = torch.ones(2, 6, 16), torch.zeros(2, 6, 16)
    mask = torch.ones(2, 1, 6, 6).tril().bool()
    mask[1, :, :, :2] = False
    cache, other = DynamicCache(config=model.config), DynamicCache(config=model.config)
    keyword = cache_keyword(attention)
    exact = attention(hidden_states=x, position_embeddings=rotary, attention_mask=mask, **{keyword: cache})[0]
    assert torch.equal(attention(x, rotary, mask, other)[0], exact)
    assert torch.equal(get_memory(other)[0], get_memory(cache)[0])


def test_an_attach_that_fails_leaves_the_model_as_it_was():
    model, ids = remembering(), tokens(1, 6)
    detach_memory(model)
    before, classes = model(ids).logits, [type(module) for module in model.modules()]
    for module in (model.model.layers[1].self_attn, model.model):
        module.forward = type(module).forward.__get__(module)
        with pytest.raises(ValueError, match="was replaced by another library"):
            attach_memory(model, DeltaMemConfig())
        del module.forward
        assert [type(each) for each in model.modules()] == classes
        assert torch.equal(model(ids).logits, before)


def test_a_detach_that_fails_leaves_the_model_as_it_was():
    model, ids = remembering(), tokens(1, 6)
    before, projection = model(ids).logits, model.model.layers[1].self_attn.q_proj
    torch.nn.utils.parametrize.register_parametrization(projection, "weight", torch.nn.Identity())
    with pytest.raises(RuntimeError, match=r"the class of a .*Linear was changed after attach_memory"):
        detach_memory(model)
    assert relative_error(model(ids).logits, before) <= CLOSE
    torch.nn.utils.parametrize.remove_parametrizations(projection, "weight")
    detach_memory(model)
    assert not any(isinstance(module, Extension) for module in model.modules())


@torch.no_grad()
def test_a_replica_of_data_parallel_does_not_change_the_model():
    model, ids = remembering(), tokens(1, 6)
    before, attention = model(ids).logits, model.model.layers[0].self_attn
    replica = attention._replicate_for_data_parallel()
    replica._modules = dict(attention._modules)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        replica._modules[name] = attention._modules[name]._replicate_for_data_parallel()
        replica._modules[name]._parameters = dict(attention._modules[name]._parameters)
    model.model.layers[0]._modules["self_attn"] = replica
    assert torch.equal(model(ids).logits, before)
    model.model.layers[0]._modules["self_attn"] = attention
    assert torch.equal(model(ids).logits, before)


def test_a_memory_call_of_a_part_of_the_model_raises():
    model = remembering()
    with (
        pytest.raises(ValueError, match="the MemoryCall has no state of layer 1: create it with the whole model"),
        MemoryCall(model.model.layers[0], {0: torch.randn(1, 1, 8, 8)}),
    ):
        model(tokens(1, 5), use_cache=False)


def test_layers_without_a_memory_get_no_context():
    model, seen = remembering(target_layers=(1,)), []
    model.train()
    model.model.layers[0].register_forward_pre_hook(lambda m, a, k: seen.append(set(k)), with_kwargs=True)
    model(tokens(1, 5), use_cache=False).logits.sum().backward()
    assert len(seen) == 1
    assert not any("memory" in name for name in seen[0])


def test_a_memory_detached_in_the_stack_alone_can_be_attached_again():
    model, ids = remembering(), tokens(1, 6)
    detach_memory(model.model)
    attach_memory(model, DeltaMemConfig(output_init="random"))
    assert model(ids).logits.isfinite().all()
    detach_memory(model)
    assert not any(isinstance(module, Extension) for module in model.modules())
