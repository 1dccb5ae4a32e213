"""`MemoryCall`: the calls that it applies to, and the states that it returns."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Iterator

import pytest
import torch
from models import VOCABULARY, backbone, logits, one_thread, remembering, tokens
from torch import Tensor
from transformers import DynamicCache

from deltamem_kernels.integrations.transformers import MemoryCall, get_memory, set_memory
from deltamem_kernels.integrations.transformers.cache_keyword import cache_keyword
from deltamem_kernels.testing import relative_error

__all__ = ["one_thread"]


def some_states(model, batch: int = 1) -> dict[int, Tensor]:
    return {index: torch.randn(batch, 1, 8, 8) for index in range(model.config.num_hidden_layers)}


def stream(model, states, ids) -> Iterator[Tensor]:
    with MemoryCall(model, states):
        for _ in range(2):
            yield logits(model, ids, use_cache=False)


def test_a_call_left_open_over_a_yield_raises_and_ends():
    """Two generators yield inside of their `with`, in turn. The first one to close raises."""
    model, ids = remembering(), tokens(1, 5)
    before = logits(model, ids, use_cache=False)
    first, second = (stream(model, some_states(model), ids) for _ in range(2))
    next(first), next(second)
    with pytest.raises(RuntimeError, match="closed before another one that was opened inside it"):
        list(first)
    list(second)
    assert torch.equal(logits(model, ids, use_cache=False), before)


def test_a_context_that_outlives_the_call_is_outside_of_it():
    """Such as the context of an asyncio task that was started inside of the `with`."""
    model, ids = remembering(), tokens(1, 5)
    before = logits(model, ids, use_cache=False)
    with MemoryCall(model, some_states(model)):
        inside = logits(model, ids, use_cache=False)
        copied = contextvars.copy_context()
        assert torch.equal(copied.run(logits, model, ids, use_cache=False), inside)
    assert not torch.equal(inside, before)
    assert torch.equal(copied.run(logits, model, ids, use_cache=False), before)


def test_another_thread_is_outside_of_the_call_but_shares_the_cache():
    model, ids, found = remembering(), tokens(1, 5), []
    states = some_states(model)
    with MemoryCall(model, states):
        inside = logits(model, ids, use_cache=False)

    def elsewhere(**options) -> None:
        thread = threading.Thread(target=lambda: found.append(logits(model, ids, **options)))
        thread.start()
        thread.join()

    with pytest.warns(UserWarning, match="other threads do not see it"), MemoryCall(model, states):
        elsewhere(use_cache=False)
    cache = DynamicCache(config=model.config)
    set_memory(model, cache, states)
    elsewhere(cache=cache)
    assert torch.equal(found[0], logits(model, ids, use_cache=False))
    assert torch.equal(found[1], inside)


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"num_beams": 3}], ids=str)
def test_states_are_those_of_the_cache(options):
    """Without the drafts that were rejected, and for the chosen beams."""
    model = remembering()
    usual = {"max_new_tokens": 7, "do_sample": False, "return_dict_in_generate": True}
    usual["eos_token_id"] = VOCABULARY  # which no model says
    for _ in range(8):
        ids = tokens(1, 4).repeat(1, 3)
        with MemoryCall(model) as call:
            out = model.generate(ids, **usual, **options)
        of_cache = get_memory(out[cache_keyword(model)])
        assert call.states.keys() == of_cache.keys() != set()
        for index, state in of_cache.items():
            assert torch.equal(call.states[index], state)


def test_states_of_a_call_do_not_change_with_the_cache():
    model, ids = remembering(), tokens(1, 6)
    cache = DynamicCache(config=model.config)
    with MemoryCall(model) as call:
        logits(model, ids[:, :4], cache=cache)
    left = {index: state.clone() for index, state in call.states.items()}
    logits(model, ids[:, 4:], cache=cache)
    for index, state in call.states.items():
        assert torch.equal(state, left[index])
        assert relative_error(get_memory(cache)[index], state) > 1e-3


def test_states_of_another_batch_raise():
    model, ids = remembering(), tokens(1, 5)
    states = some_states(model)
    options = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False}
    message = "of 1 sequences, but the model is called with a batch of 3: for beams or several answers"
    with pytest.raises(ValueError, match=message), MemoryCall(model, states):
        model.generate(ids, **options)
    with MemoryCall(model, {index: state.repeat_interleave(3, 0) for index, state in states.items()}):
        assert model.generate(ids, **options).shape == (1, 9)


def test_arguments_that_do_not_fit_raise():
    model, states = remembering(), {0: torch.zeros(2, 1, 8, 8), 1: torch.zeros(2, 1, 8, 8)}
    ids = torch.zeros(2, 5, dtype=torch.long)
    for arguments, message in (
        ({"states": [1]}, "states must be a dict"),
        ({"states": {0: states[0]}}, r"states must have the keys \[0, 1\] .*, got \[0\]"),
        (
            {"states": {**states, 1: torch.zeros(2, 8, 8)}},
            r"states\[1\] must be float32 or float64 \[B, 1, 8, 8\], got float32",
        ),
        ({"states": {**states, 1: torch.zeros(3, 1, 8, 8)}}, "the same batch size"),
        ({"write": 1}, "write must be True or False"),
        ({"message_ids": ids}, "message_ids must be None .* 'token'"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            MemoryCall(model, **arguments)
    with pytest.raises(ValueError, match="the model has no memory"):
        MemoryCall(backbone())
    sentences = remembering(memory_write_granularity="sentence_mean")
    with pytest.raises(ValueError, match="sentence_ids must be given"):
        MemoryCall(sentences, message_ids=ids)
    with pytest.raises(TypeError, match="sentence_ids must be int32 or int64"):
        MemoryCall(sentences, sentence_ids=ids.float())
    with pytest.raises(ValueError, match=r"of 2 sequences, .* a batch of 3"), MemoryCall(model, states):
        logits(model, tokens(3, 4))
    cache = DynamicCache(config=model.config)
    with pytest.raises(ValueError, match="states must have the keys"):
        set_memory(model, cache, {})
    with pytest.raises(TypeError, match="cache must be a Cache"):
        set_memory(model, (), states)
    set_memory(model, cache, states)
    with pytest.raises(ValueError, match="of 2 sequences"):  # another batch: never a silent reset
        logits(model, tokens(3, 4), cache=cache)
