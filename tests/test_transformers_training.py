"""Gradients, packed rows and messages in calls of a model with a memory."""

from __future__ import annotations

import copy
import multiprocessing
import os

import pytest
import torch
from models import CLOSE, logits, one_thread, remembering, tokens
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from transformers import DynamicCache

from deltamem_kernels.integrations.transformers import MemoryCall, get_memory, layer_call, memory_layers
from deltamem_kernels.integrations.transformers.context import running
from deltamem_kernels.nn import DeltaMemConfig
from deltamem_kernels.testing import relative_error

__all__ = ["one_thread"]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_checkpointed_gradients_are_those_of_plain_calls(kind, reentrant):
    """Also if the call starts from a state and does not write, or writes messages."""
    for fields, options in (
        ({}, {}),
        ({}, {"write": False}),
        ({"memory_write_granularity": "message_mean"}, {"message_ids": torch.randint(-1, 3, (2, 10))}),
    ):
        model, ids = remembering(kind, **fields), tokens(2, 10)
        model.train()
        states = {index: torch.randn(2, 1, 8, 8) for index in (0, 1)}
        found = []
        for checkpointed in (False, True):
            if checkpointed:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
                model.enable_input_require_grads()
            model.zero_grad()
            with MemoryCall(model, states, **options) as call:
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            before_backward = dict(call.states)
            loss.backward()
            assert all(call.states[index] is before_backward[index] for index in (0, 1))
            found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        assert any(grad is not None and grad.any() for grad in found[0].values())
        for name, grad in found[0].items():
            assert (grad is None) == (found[1][name] is None), name
            assert grad is None or relative_error(found[1][name], grad) <= 1e-6, name


def test_states_carry_gradients_from_call_to_call():
    model, ids = remembering(), tokens(2, 12)
    model.train()
    start = {index: torch.randn(2, 1, 8, 8, requires_grad=True) for index in (0, 1)}
    with MemoryCall(model, start) as call:
        model(input_ids=ids[:, :7], use_cache=False)
    with MemoryCall(model, call.states):
        model(input_ids=ids[:, 7:], use_cache=False).logits.square().sum().backward()
    for state in start.values():
        assert state.grad.any()
    assert model.model.layers[0].self_attn.delta_memory.memory_v_proj.grad.any()


@pytest.mark.parametrize("kind", ["message_mean", "sentence_mean"])
def test_messages_write_their_means(kind):
    model, ids = remembering(memory_write_granularity=kind, num_state_heads=2), tokens(2, 9)
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, -1], [-1, 0, 0, 0, 0, 1, 1, 1, 1]])
    given = {"message_ids": segments}
    if kind == "sentence_mean":
        given = {"message_ids": segments.clamp(max=0), "sentence_ids": segments.clamp_min(0)}
    x = []
    attention = model.model.layers[0].self_attn
    attention.register_forward_pre_hook(lambda m, a, k: x.append(k["hidden_states"]), with_kwargs=True)
    cache = DynamicCache(config=model.config)
    with MemoryCall(model, **given):
        logits(model, ids, cache=cache)
    exact = attention.delta_memory.read(x[0], segment_ids=segments, num_segments=3).state
    assert relative_error(get_memory(cache)[0], exact) <= 1e-6
    with pytest.raises(ValueError, match="can only be cropped as a whole, 9 tokens"):
        cache.crop(-1)
    cache.crop(-9)
    assert get_memory(cache) == {}
    with MemoryCall(model, **given):  # the prompt's ids; what is generated writes token by token
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    with (
        pytest.raises(ValueError, match=r"must have the shape of the tokens, \[2, 8\], got \[2, 9\]"),
        MemoryCall(model, **given),
    ):
        logits(model, ids[:, :8])


def test_tokens_without_messages_warn_once():
    layer_call._warn_of_tokens.cache_clear()
    model, ids = remembering(memory_write_granularity="message_mean"), tokens(1, 5)
    with pytest.warns(UserWarning, match="no ids were given") as caught:
        ours = logits(model, ids)  # two layers
    assert len(caught) == 1
    by_token = copy.deepcopy(model)
    for _, layer in memory_layers(by_token):
        layer.delta_memory.config = DeltaMemConfig()
    assert torch.equal(ours, logits(by_token, ids))


PACKED = [{}, {"state_update_mode": "no_lambda", "num_state_heads": 2}]
PACKED += [{"couple_lambda": False, "state_update_mode": "lambda_outside", "rankwise_gates": False}]


@pytest.mark.parametrize("fields", PACKED, ids=str)
@pytest.mark.parametrize("given_by", ["position_ids", "cu_seq_lens_q"])
def test_each_packed_sequence_gives_what_it_gives_alone(given_by, fields):
    """In logits and gradients. The state of the call is that of the last sequence."""
    model, parts = remembering("qwen3", **fields), [tokens(1, n) for n in (4, 1, 7)]
    positions = torch.cat([torch.arange(x.shape[1]) for x in parts])[None]
    given = {"position_ids": positions}  # which keep the sequences apart in attention
    if given_by == "cu_seq_lens_q":
        given |= {"cu_seq_lens_q": torch.tensor([0, 4, 5, 5, 12, 12], dtype=torch.int32)}
    weight = model.model.layers[0].self_attn.delta_memory.memory_v_proj
    with MemoryCall(model) as call:
        packed = model(input_ids=torch.cat(parts, 1), use_cache=False, **given).logits
    alone = []
    for part in parts:
        with MemoryCall(model) as last:
            alone.append(model(input_ids=part, use_cache=False).logits)
    assert relative_error(packed, torch.cat(alone, 1)) <= CLOSE
    assert all(relative_error(call.states[i], last.states[i]) <= CLOSE for i in (0, 1))
    cotangent = torch.randn_like(packed)
    grads = [torch.autograd.grad(x, weight, cotangent)[0] for x in (packed, torch.cat(alone, 1))]
    assert relative_error(*grads) <= 1e-4
    one = model(input_ids=torch.cat(parts, 1), use_cache=False).logits
    assert relative_error(one[:, 4:], packed[:, 4:]) > 1e-3  # it does make a difference
    if given_by == "position_ids":  # one row of positions for two rows, and by position
        twice = model.model(torch.cat(parts, 1).repeat(2, 1), None, positions, use_cache=False).last_hidden_state
        assert relative_error(model.lm_head(twice), packed.expand(2, -1, -1)) <= CLOSE


def test_the_first_packed_sequence_continues_from_the_state():
    """The other sequences of a row start from zeros, also if nothing is written."""
    model, ids = remembering(), tokens(2, 9)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1], [5, 6, 7, 8, 9, 20, 21, 22, 23]])
    states = {index: torch.randn(2, 1, 8, 8) for index in (0, 1)}
    for write in (True, False):
        with MemoryCall(model, states, write=write):
            packed = logits(model, ids, position_ids=positions, use_cache=False)
        for row, cuts in enumerate(([4, 3, 2], [5, 4])):
            start = {index: state[row : row + 1] for index, state in states.items()}
            for i, (part, ours) in enumerate(zip(ids[row].split(cuts), packed[row].split(cuts), strict=True)):
                with MemoryCall(model, None if i else start, write=write):
                    at = positions[row].split(cuts)[i][None]
                    assert relative_error(ours, logits(model, part[None], position_ids=at, use_cache=False)[0]) <= CLOSE


def test_padding_and_offsets_are_not_taken_for_packed_rows():
    """Positions restart after padding too, and a continued request may start at any position."""
    model, ids = remembering(), tokens(2, 6)
    attention = model.model.layers[0].self_attn
    seen = []
    attention.register_forward_pre_hook(lambda *_: seen.append(running.context.starts))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    logits(model, ids, attention_mask=mask, position_ids=torch.tensor([[1, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]))
    logits(model, ids, position_ids=torch.arange(6)[None] + 3)
    logits(model, ids)
    logits(model, ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), use_cache=True)  # one sequence to attention too
    assert seen == [None] * 4


def test_packed_rows_that_do_not_fit_raise():
    model, ids = remembering(memory_write_granularity="message_mean"), tokens(1, 6)
    for limits, message in (
        (torch.zeros(2), "cu_seq_lens_q must be int32 or int64"),
        ([0, 6], "cu_seq_lens_q must be"),
    ):
        with pytest.raises(TypeError, match=message):
            logits(model, ids, cu_seq_lens_q=limits, use_cache=False)
    with pytest.raises(ValueError, match="cu_seq_lens_q needs a batch of one packed row, got 2"):
        logits(model, ids.repeat(2, 1), cu_seq_lens_q=torch.tensor([0, 6]), use_cache=False)
    with pytest.raises(ValueError, match="starts must be None"), MemoryCall(model, message_ids=torch.zeros_like(ids)):
        logits(model, ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), use_cache=False)


def step_of(rank: int, model, ids, path: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{path}/meeting", rank=rank, world_size=2)
    parallel = DistributedDataParallel(model)
    parallel(input_ids=ids[rank : rank + 1], labels=ids[rank : rank + 1], use_cache=False).loss.backward()
    torch.save({n: p.grad for n, p in model.named_parameters() if p.requires_grad}, f"{path}/{rank}")
    distributed.barrier()
    # Without destructors: that of a gloo group waits, with the GIL, for a thread that may wait for the GIL.
    os._exit(0)


@pytest.mark.slow
def test_distributed_gradients_are_those_of_one_process(tmp_path):
    """Each of two processes has one row."""
    model, ids = remembering(delta_heads=("q", "o")), tokens(2, 8)
    fresh = multiprocessing.get_context("spawn")
    workers = [fresh.Process(target=step_of, args=(rank, model, ids, str(tmp_path)), daemon=True) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(300)
    assert [worker.exitcode for worker in workers] == [0, 0]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    found = [torch.load(tmp_path / str(rank)) for rank in (0, 1)]
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == found[0].keys()
    for name, grad in trained.items():
        assert torch.equal(found[0][name], found[1][name])
        assert relative_error(found[0][name], grad) <= 1e-4
