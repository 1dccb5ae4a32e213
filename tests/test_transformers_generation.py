"""Generation with a memory, whose states are in the cache of the request."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import (
    ARCHITECTURES,
    CLOSE,
    MEMORIES,
    TRANSFORMERS_5,
    VOCABULARY,
    logits,
    one_thread,
    remembering,
    states_of,
    tokens,
)
from transformers import DynamicCache, QuantizedCache, StaticCache
from transformers.cache_utils import Cache, QuantizedLayer

from deltamem_kernels.integrations.transformers import MemoryCall, get_memory, set_memory
from deltamem_kernels.integrations.transformers.cache_keyword import cache_keyword
from deltamem_kernels.testing import relative_error

__all__ = ["one_thread"]


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_generation_gives_what_calls_without_a_cache_give(kind, cache):
    """Also for a padded batch."""
    model, new = remembering(kind), 9
    rows = [tokens(1, n) for n in (4, 7)]
    ids, mask = torch.zeros(2, 7, dtype=torch.long), torch.zeros(2, 7, dtype=torch.long)
    for b, row in enumerate(rows):
        ids[b, 7 - row.shape[1] :], mask[b, 7 - row.shape[1] :] = row[0], 1
    batch = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, cache_implementation=cache)
    for b, row in enumerate(rows):
        for _ in range(new):
            row = torch.cat([row, logits(model, row, use_cache=False)[:, -1:].argmax(-1)], 1)
        assert torch.equal(batch[b, 7:], row[0, -new:])


def test_sliding_windows_do_not_change_the_result():
    for fields in ({"sliding_window": 4}, {"sliding_window": 4, "layer_types": ["sliding_attention"] * 2}):
        model, ids = remembering("mistral", backbone_fields=fields), tokens(2, 14)
        whole = logits(model, ids, use_cache=False)
        static = StaticCache(config=model.config, max_cache_len=20)
        for cache, cuts in ((DynamicCache(config=model.config), [6, 3, *[1] * 5]), (static, [6, *[1] * 8])):
            parts = [logits(model, part, cache=cache) for part in ids.split(cuts, dim=1)]
            assert relative_error(torch.cat(parts, 1), whole) <= CLOSE


def test_beam_search_gives_what_it_gives_without_a_cache():
    """The states follow the beams. Without a cache each step starts from the first token."""
    model, ids = remembering(), tokens(2, 5)
    options = {"max_new_tokens": 8, "num_beams": 4, "do_sample": False, "num_return_sequences": 4}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    cached = model.generate(ids, **options)
    plain = model.generate(ids, **options, use_cache=False)
    assert (cached.beam_indices[:, :8].diff(dim=1) != 0).any()  # beams did change places
    assert torch.equal(cached.sequences, plain.sequences)
    assert relative_error(cached.sequences_scores, plain.sequences_scores) <= CLOSE


def test_states_follow_selected_repeated_and_reset_rows():
    model, ids = remembering(), tokens(3, 6)
    whole = logits(model, ids, use_cache=False)
    cache = DynamicCache(config=model.config)
    logits(model, ids[:, :4], cache=cache)
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    rest = logits(model, ids[[2, 2, 0, 0], 4:], cache=copy.deepcopy(cache))
    assert relative_error(rest, whole[[2, 2, 0, 0], 4:]) <= CLOSE
    assert [state.shape for state in states_of(cache).values()] == [(4, 1, 8, 8)] * 2  # the copy has gone on alone
    cache = StaticCache(config=model.config, max_cache_len=8)
    for _ in range(2):
        assert relative_error(logits(model, ids, cache=cache), whole) <= CLOSE
        assert len(get_memory(cache)) == 2
        cache.reset()
        assert get_memory(cache) == {}


@pytest.mark.parametrize("fields", MEMORIES, ids=str)
def test_cropped_tokens_leave_no_trace(fields):
    model, ids, drafts = remembering(**fields), tokens(2, 9), tokens(2, 30)
    for cuts in ([9], [4, 1, 4], [1] * 9):
        cache, straight = DynamicCache(config=model.config), DynamicCache(config=model.config)
        logits(model, ids[:, :4], cache=straight)
        for part in ids.split(cuts, dim=1):
            logits(model, part, cache=cache)
        logits(model, drafts, cache=cache)
        cache.crop(-32)  # the drafts, and two tokens before
        cache.crop(-3)  # and three
        for index, state in states_of(cache).items():
            assert relative_error(state, get_memory(straight)[index]) <= 1e-6
        ours, theirs = (logits(model, ids[:, 4:], cache=c) for c in (cache, straight))
        assert relative_error(ours, theirs) <= CLOSE


def test_cropping_more_tokens_than_are_kept_raises():
    model, ids = remembering(), tokens(1, 4)
    cache = DynamicCache(config=model.config)
    for _ in range(3):
        logits(model, ids, cache=cache)
    cache.batch_select_indices(torch.tensor([0]))
    logits(model, ids, cache=cache)
    before = {index: state.clone() for index, state in states_of(cache).items()}
    with pytest.raises(ValueError, match="the memory can be cropped by at most 4 tokens, got 5"):
        cache.crop(-5)
    assert cache.get_seq_length() == 16
    assert all(torch.equal(state, before[index]) for index, state in states_of(cache).items())
    cache.crop(-4)
    assert cache.get_seq_length() == 12
    for _ in range(200):
        logits(model, ids[:, :1], cache=cache)
    assert len(cache.delta_memory[0].steps) == 128
    cache.crop(-128)
    with pytest.raises(ValueError, match="the memory can be cropped by at most 0 tokens, got 1"):
        cache.crop(-1)


@pytest.mark.parametrize("draft", ["lookup", "same", "other"])
def test_assisted_decoding_gives_what_plain_decoding_gives(draft):
    model, ids = remembering(), tokens(1, 12).repeat(1, 2)
    assistant = {"lookup": None, "same": copy.deepcopy(model), "other": remembering()}[draft]
    options = {"prompt_lookup_num_tokens": 4} if draft == "lookup" else {"assistant_model": assistant}
    usual = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": VOCABULARY}  # which no model says
    assisted, plain = model.generate(ids, **usual, **options), model.generate(ids, **usual)
    if not TRANSFORMERS_5:  # its prompt lookup may go beyond max_new_tokens, without a memory too
        assisted = assisted[:, : plain.shape[1]]
    assert torch.equal(assisted, plain)


def test_two_conversations_on_one_model_do_not_mix():
    """Each has the bits that it has alone."""
    model, ids = remembering(), [tokens(1, 15), tokens(2, 15)]
    parts = [x.split([4, 1, 1, 5, 1, 3], dim=1) for x in ids]

    def alone(parts):
        cache = DynamicCache(config=model.config)
        return [logits(model, part, cache=cache) for part in parts]

    exact = [alone(p) for p in parts]
    caches = [DynamicCache(config=model.config) for _ in ids]
    for turn in range(6):
        for conversation in (0, 1):
            ours = logits(model, parts[conversation][turn], cache=caches[conversation])
            assert torch.equal(ours, exact[conversation][turn])


def test_threads_on_one_model_do_not_mix():
    model, ids = remembering(), [tokens(1, 40) for _ in range(4)]
    exact = [logits(model, x) for x in ids]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for ours, alone in zip(pool.map(lambda x: logits(model, x), ids), exact, strict=True):
                assert torch.equal(ours, alone)


def test_a_state_alone_serves_a_new_conversation():
    """The states of one cache are given to a new one, which has no keys and values of the first conversation."""
    model, ids = remembering(), tokens(1, 20)
    cache = DynamicCache(config=model.config)
    logits(model, ids, cache=cache)
    states = get_memory(cache)
    fresh = DynamicCache(config=model.config)
    set_memory(model, fresh, states)
    with MemoryCall(model, states) as call:
        without_cache = logits(model, ids[:, :5], use_cache=False)
    assert relative_error(logits(model, ids[:, :5], cache=fresh), without_cache) <= CLOSE
    assert relative_error(without_cache, logits(model, ids[:, :5])) > 1e-3  # it does remember
    for index, state in states_of(fresh).items():
        assert relative_error(state, call.states[index]) <= 1e-6
    with MemoryCall(model, states):
        ours = model.generate(ids[:, :5], max_new_tokens=6, do_sample=False)
    again = DynamicCache(config=model.config)
    set_memory(model, again, states)
    options = {"max_new_tokens": 6, "do_sample": False, cache_keyword(model): again}
    assert torch.equal(ours, model.generate(ids[:, :5], **options))


def test_without_writing_the_states_stay():
    model, ids = remembering(), tokens(2, 8)
    cache = DynamicCache(config=model.config)
    logits(model, ids, cache=cache)
    before = {index: state.clone() for index, state in states_of(cache).items()}
    with MemoryCall(model, write=False) as call:
        logits(model, ids, cache=cache)
    for index, state in states_of(cache).items():
        assert torch.equal(state, before[index])
        assert torch.equal(call.states[index], before[index])
    logits(model, ids, cache=cache)
    assert not torch.equal(get_memory(cache)[0], before[0])
    cache.crop(-16)
    assert all(relative_error(state, before[index]) <= 1e-6 for index, state in states_of(cache).items())


class Rounded(QuantizedLayer):
    """A quantised layer of transformers that keeps two tokens unquantised. 16-bit floats stand for its integers."""

    def __init__(self) -> None:
        super().__init__(residual_length=2)

    def _quantize(self, tensor, axis):
        return tensor.bfloat16()

    def _dequantize(self, tensor):
        return tensor.float()


NEWER = pytest.mark.skipif(not TRANSFORMERS_5, reason="transformers 4 has no cache in fp8")


@pytest.mark.parametrize("kind", [pytest.param("fp8", marks=NEWER), "residual"])
def test_quantised_caches_do_not_quantise_the_states(kind):
    """Keys and values lose digits. The states are those that the memory makes of the same hidden states."""
    model, ids = remembering(), tokens(2, 12)

    def cache():
        if kind == "residual":
            return Cache(layers=[Rounded(), Rounded()])
        return QuantizedCache(backend="fp8", config=model.config)

    seen: dict[int, list] = {0: [], 1: []}
    for index, layer in enumerate(model.model.layers):
        hook = lambda m, a, k, index=index: seen[index].append(k["hidden_states"])  # noqa: E731
        layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True)
    quantised = cache()
    for part in ids.split([5, *[1] * 7], dim=1):
        logits(model, part, cache=quantised)
    for index, state in states_of(quantised).items():
        assert state.dtype == torch.float32
        memory = model.model.layers[index].self_attn.delta_memory
        assert relative_error(state, memory.read(torch.cat(seen[index], 1)).state) <= 1e-6
    with pytest.raises(ValueError, match="a quantised cache cannot be cropped"):
        quantised.crop(-1)
    before = {index: state.clone() for index, state in states_of(quantised).items()}
    quantised.reorder_cache(torch.tensor([1, 0]))
    assert all(torch.equal(state.flip(0), before[index]) for index, state in states_of(quantised).items())
    quantised.reset()
    assert get_memory(quantised) == {}
    beams = 2 if TRANSFORMERS_5 else 1  # transformers 4 reorders the residue of integers even where it is empty
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, cache_keyword(model): cache()}
    assert model.generate(ids, **options).shape == (2, 18)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_padded_token_of_a_step_writes_nothing(attention):
    """It reads nothing either. The other rows are not affected."""
    model, ids = remembering(attention=attention), tokens(3, 7)
    cache = DynamicCache(config=model.config)
    logits(model, ids[:, :6], cache=cache)
    before = {index: state.clone() for index, state in states_of(cache).items()}
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 6] = 0
    straight = copy.deepcopy(cache)
    padded = logits(model, ids[:, 6:], attention_mask=mask, cache=cache)
    whole = logits(model, ids[:, 6:], cache=straight)
    assert relative_error(padded[[0, 2]], whole[[0, 2]]) <= CLOSE
    for index, state in states_of(cache).items():
        assert torch.equal(state[1], before[index][1])
        assert relative_error(state[[0, 2]], get_memory(straight)[index][[0, 2]]) <= CLOSE
        assert not torch.equal(state[0], before[index][0])
    cache.crop(-1)
    assert all(torch.equal(state, before[index]) for index, state in states_of(cache).items())


@pytest.mark.parametrize("heads", [(), ("k",), ("v", "o"), ("o",), ("q", "k", "v", "o")], ids=str)
@pytest.mark.parametrize("write", [True, False])
def test_a_step_gives_what_a_call_of_one_token_gives(heads, write):
    """The step corrects in place without gradients. The call records them."""
    fields = {"delta_o_rmsnorm": True, "trainable_delta_scale": True} if "q" in heads else {}
    model, ids = remembering("qwen3", delta_heads=heads, **fields), tokens(2, 5)
    states = {index: torch.randn(2, 1, 8, 8) for index in (0, 1)}
    kept = {index: state.clone() for index, state in states.items()}
    with MemoryCall(model, states, write=write) as recorded:
        exact = model(input_ids=ids[:, :1], use_cache=False).logits
    with MemoryCall(model, states, write=write) as call:
        assert relative_error(logits(model, ids[:, :1], use_cache=False), exact) <= CLOSE
    for index, state in call.states.items():
        assert relative_error(state, recorded.states[index]) <= CLOSE
        assert torch.equal(states[index], kept[index])  # a step's place is its own
