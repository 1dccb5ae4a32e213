"""Find the attention modules of a model that can have a memory, and those that have one."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from ...nn import DeltaMemConfig, DeltaMemory
from ...nn.config import HEADS
from .cache_keyword import CACHE_KEYWORDS, cache_keyword
from .extending import Extension

WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")  # names of the module in a wrapper

CACHE_SLOTS = ("cache_offset", "cycle_offset", "layer_idx")
"""Arguments of attention modules that can run several times in one forward pass, with a slot of the cache each time."""

WANTED = f"{', '.join(f'{head}_proj' for head in HEADS)} and layer_idx"


def check_model(model: object, config: object) -> None:
    """Raise TypeError unless the arguments are a model and the configuration of a memory, in this order."""
    _check_module(model)
    if not isinstance(config, DeltaMemConfig):
        raise TypeError(f"config must be a DeltaMemConfig, got {type(config).__name__} {config!r:.60}")


def _check_module(model: object) -> None:
    if isinstance(model, nn.Module):
        return
    wanted = "model must be a loaded transformers model (a torch.nn.Module)"
    if isinstance(model, DeltaMemConfig):
        raise TypeError(
            f"{wanted}, got a DeltaMemConfig: the model is the first argument, the configuration the second"
        )
    hint = ": load it first, for example with AutoModelForCausalLM.from_pretrained" if isinstance(model, str) else ""
    raise TypeError(f"{wanted}, got {type(model).__name__} {model!r:.60}{hint}")


def memory_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Return names and modules of the attention layers with a memory, which is their submodule `delta_memory`.

    Raises:
        TypeError: model is not a module.
    """
    _check_module(model)
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, Extension) and "delta_memory" in module._modules
    ]


def memory_of(attention: Any) -> DeltaMemory:
    """Return the memory of an attention layer, without what wraps it, such as PEFT's modules_to_save."""
    return attention.delta_memory.read.__self__


def attention_layers(model: nn.Module, config: DeltaMemConfig) -> list[tuple[str, Any]]:
    """Return names and modules of the attention layers that the configuration selects and that support a memory.

    Raises:
        TypeError: an argument is of another type.
        ValueError: there is none, or some of target_layers are missing. The message gives the reason.
    """
    check_model(model, config)
    named: list[tuple[str, Any]] = [
        (name, module)
        for name, module in model.named_modules()
        if _own_name(name) in config.target_modules and not any(hasattr(module, wrapper) for wrapper in WRAPPERS)
    ]
    if not named:
        raise ValueError(
            f"target_modules: the model has no module named {' or '.join(config.target_modules)}, with {WANTED}"
            f"{_instead(model)}"
        )
    fitting = [(name, module) for name, module in named if _why_not(module) is None]
    if not fitting:
        name, module = named[0]
        raise ValueError(
            f"the model's attention does not fit: {name} ({_class_name(module)}) {_why_not(module)}. A memory needs "
            f"{WANTED}"
        )
    indices = [module.layer_idx for _, module in fitting]
    if len(set(indices)) != len(indices):
        raise ValueError(
            f"the model's attention does not fit: several modules have the same layer_idx, {sorted(indices)}"
        )
    missing = sorted(set(config.target_layers) - set(indices))
    if missing:
        raise ValueError(f"target_layers must be among the layers {sorted(indices)}, got {missing}")
    return [(n, m) for n, m in fitting if not config.target_layers or m.layer_idx in config.target_layers]


def _why_not(attention: nn.Module) -> str | None:
    """Return why a module cannot have a memory, or None."""
    if type(getattr(attention, "layer_idx", None)) is not int:
        return f"has no layer_idx, only {_parts(attention)}"
    for head in HEADS:
        projection = getattr(attention, f"{head}_proj", None)
        if not isinstance(projection, nn.Module):
            return f"has no {head}_proj, only {_parts(attention)}"
        if not all(type(getattr(projection, n, None)) is int for n in ("in_features", "out_features")):
            return f"has a {head}_proj ({_class_name(projection)}) without in_features and out_features"
    if cache_keyword(attention) is None:
        return f"does not take {' or '.join(CACHE_KEYWORDS)}, which holds the states"
    slot = next((name for name in CACHE_SLOTS if name in inspect.signature(attention.forward).parameters), None)
    if slot is not None:
        return f"takes {slot}: it can run several times in one forward pass, and a layer has one state"
    return None


def _own_name(name: str) -> str:
    """Return the last part of a module's name that does not come from a wrapper."""
    return next((part for part in reversed(name.split(".")) if part not in WRAPPERS), "")


def _instead(model: nn.Module) -> str:
    """Describe the module of a model that looks like its attention; empty if none does."""
    for name, module in model.named_modules():
        if "attention" in _class_name(module).lower() and any(module.children()):
            return f". Its attention seems to be {name} ({_class_name(module)}), which has {_parts(module)}"
    return ""


def _parts(module: nn.Module) -> str:
    return ", ".join(name for name, _ in module.named_children()) or "no submodules"


def _class_name(module: nn.Module) -> str:
    return type(module).__name__
