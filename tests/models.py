"""Small random models of transformers, with and without a memory."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from deltamem_kernels.integrations.transformers import attach_memory, get_memory, memory_layers
from deltamem_kernels.integrations.transformers.cache_keyword import cache_keyword
from deltamem_kernels.nn import DeltaMemConfig

ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM, {"no_rope_layers": [1, 0]}),
}
DROPPING = {  # their layers take keywords, and do not pass them on to attention
    "stablelm": (StableLmConfig, StableLmForCausalLM, {}),
    "nemotron": (NemotronConfig, NemotronForCausalLM, {}),
}
MEMORIES = [
    {"delta_heads": ("q", "o")},
    {},
    {"num_state_heads": 4, "rank": 4, "delta_heads": ("q", "o")},
    {"couple_lambda": False, "state_update_mode": "lambda_outside", "delta_o_rmsnorm": True},
]
CLOSE = 2e-5  # of ‖logits‖: two orders of the same float32 sums, through two layers
VOCABULARY = 99
TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5


def backbone(kind: str = "llama", attention: str = "sdpa", **more):
    config, model, special = (ARCHITECTURES | DROPPING)[kind]
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    fields = {**sizes, **tokens, "intermediate_size": 96, "max_position_embeddings": 512, **special, **more}
    config = config(**fields)
    config._attn_implementation = attention
    built = model(config).eval().requires_grad_(False)
    built.generation_config.pad_token_id = 0
    return built


def remembering(kind: str = "llama", attention: str = "sdpa", backbone_fields=None, **fields):
    """Return a model with a random memory that changes the logits."""
    model = backbone(kind, attention, **(backbone_fields or {}))
    attach_memory(model, DeltaMemConfig(**fields))
    randomise_memory(model)
    return model


def randomise_memory(model) -> None:
    with torch.no_grad():
        for _, layer in memory_layers(model):
            for name, weight in layer.delta_memory.named_parameters():
                if weight.requires_grad:
                    weight.add_(torch.randn_like(weight) * (0.1 if name.endswith("proj") else 0.5))


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (batch, length))


@torch.no_grad()
def logits(model, ids, *, cache=None, **more):
    if cache is not None:
        plain = getattr(model, "_orig_mod", model)  # a compiled model's forward has no signature of its own
        more[cache_keyword(plain)] = cache
    return model(input_ids=ids, **more).logits


def states_of(cache) -> dict[int, torch.Tensor]:
    """Return the states of a cache. There must be some: a loop over none compares nothing."""
    states = get_memory(cache)
    assert states, "the cache has no states"
    return states


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small are slower with threads. A module that imports this fixture uses it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
