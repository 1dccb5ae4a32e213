"""The keyword of the cache: `cache` since transformers 5.24, `past_key_values` before."""

from __future__ import annotations

import pytest
import torch
from models import ARCHITECTURES, logits, one_thread, remembering, states_of, tokens
from torch import nn
from transformers import DynamicCache
from transformers.generation.continuous_batching import PagedAttentionCache

from deltamem_kernels.integrations.transformers import attach_memory, get_memory
from deltamem_kernels.integrations.transformers.cache_keyword import CACHE_KEYWORDS, cache_keyword
from deltamem_kernels.integrations.transformers.packing import sequence_starts
from deltamem_kernels.nn import DeltaMemConfig
from deltamem_kernels.testing import relative_error

__all__ = ["one_thread"]


class Attention(nn.Module):
    """The projections without the attention, which is enough for a memory. Subclasses name the cache."""

    layer_idx = 0

    def __init__(self) -> None:
        super().__init__()
        for head in "qkvo":
            setattr(self, f"{head}_proj", nn.Linear(16, 16, bias=False))

    def attend(self, x, cache):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if cache is not None:
            cache.update(k[:, None], v[:, None], self.layer_idx)
        return self.o_proj(q + v)


class Since524(Attention):
    def forward(self, hidden_states, cache=None):
        return self.attend(hidden_states, cache)


class Before524(Attention):
    def forward(self, hidden_states, past_key_values=None, **kwargs):
        return self.attend(hidden_states, past_key_values)


ATTENTIONS = {"cache": Since524, "past_key_values": Before524}


def attention_with_memory(keyword):
    model = nn.Module()
    model.self_attn = ATTENTIONS[keyword]()
    attach_memory(model.requires_grad_(False), DeltaMemConfig())
    for name, weight in model.self_attn.delta_memory.named_parameters():
        nn.init.normal_(weight, std=0.3 if name.endswith("proj") else 0.5)
    return model.self_attn


@pytest.mark.parametrize("keyword", CACHE_KEYWORDS)
@torch.no_grad()
def test_the_state_is_kept_in_the_cache_under_either_keyword(keyword):
    attention, x, cache = attention_with_memory(keyword), torch.randn(2, 7, 16), DynamicCache()
    assert cache_keyword(attention) == keyword
    whole = attention(x)
    parts = [attention(part, **{keyword: cache}) for part in x.split([3, 1, 1, 2], dim=1)]
    assert relative_error(torch.cat(parts, 1), whole) <= 1e-5
    assert relative_error(get_memory(cache)[0], attention.delta_memory.read(x).state) <= 1e-5
    assert relative_error(torch.cat([attention(part) for part in x.split([3, 4], dim=1)], 1), whole) > 1e-3


@pytest.mark.parametrize("keyword", CACHE_KEYWORDS)
def test_rows_with_a_cache_are_not_packed(keyword):
    stack, positions = nn.Module(), {"position_ids": torch.tensor([[0, 1, 0, 1]]), "use_cache": False}
    stack.config = None
    assert sequence_starts(stack, (), positions).tolist() == [[False, False, True, False]]
    assert sequence_starts(stack, (), {**positions, keyword: DynamicCache()}) is None
    assert sequence_starts(stack, (), {**positions, keyword: None}) is not None


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_module_of_the_installed_models_takes_the_same_keyword(kind):
    model, ids, cache = remembering(kind), tokens(1, 5), DynamicCache()
    keyword = cache_keyword(model)
    assert keyword in CACHE_KEYWORDS
    assert {cache_keyword(m) for m in (model.model, *(layer.self_attn for layer in model.model.layers))} == {keyword}
    logits(model, ids, cache=cache)
    assert get_memory(cache).keys() == {0, 1}


def test_the_old_keyword_is_still_accepted():
    """transformers 5.24 renames it inside of the call, after the hooks of the module have run."""
    model, ids = remembering(), tokens(2, 6)
    old, own = DynamicCache(config=model.config), DynamicCache(config=model.config)
    for part in ids.split([4, 1, 1], dim=1):
        assert torch.equal(logits(model, part, past_key_values=old), logits(model, part, cache=own))
    assert all(torch.equal(state, get_memory(own)[index]) for index, state in states_of(old).items())
    x, attention = torch.randn(1, 3, model.config.hidden_size), model.model.layers[0].self_attn
    rotary, cache = (torch.ones(1, 3, 16), torch.zeros(1, 3, 16)), DynamicCache(config=model.config)
    with torch.no_grad():
        attention(x, position_embeddings=rotary, attention_mask=None, past_key_values=cache)
    assert get_memory(cache).keys() == {0}


@pytest.mark.parametrize("given", CACHE_KEYWORDS)
@pytest.mark.parametrize("keyword", CACHE_KEYWORDS)
def test_a_paged_cache_raises(keyword, given):
    attention, paged = attention_with_memory(keyword), object.__new__(PagedAttentionCache)
    with pytest.raises(ValueError, match=r"a paged cache \(generate_batch\) cannot hold"):
        attention(torch.randn(1, 3, 16), **{given: paged})
    with pytest.raises(TypeError, match="cache must be a Cache of transformers for one decoder, got list"):
        attention(torch.randn(1, 3, 16), **{given: []})


def test_an_attention_without_a_cache_raises():
    model = nn.Module()
    model.self_attn = Attention()
    model.self_attn.forward = lambda hidden_states: hidden_states
    assert cache_keyword(model.self_attn) is None
    with pytest.raises(ValueError, match="does not take cache or past_key_values, which holds the states"):
        attach_memory(model, DeltaMemConfig())
