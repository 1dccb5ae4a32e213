"""`attach_memory`: give each attention module of a model a memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...nn import DeltaMemConfig, DeltaMemory
from ...nn.config import HEADS
from .context import Attachment
from .extending import Extension, check_restorable, extend, restore
from .extensions import Attention, Layer, Model, Stack, carry_context, extend_projections, restore_projection
from .layers import WRAPPERS, attention_layers, check_model, memory_layers


def attach_memory(model: nn.Module, config: DeltaMemConfig, *, dtype: torch.dtype = torch.float32) -> list[str]:
    """Attach a memory to each attention layer of a model, as its submodule `delta_memory`. Use the model as before.

    The states are kept in the cache of a request and start from zeros. The backbone is not frozen: call
    `model.requires_grad_(False)` first to train only the memory.

    Args:
        model: a transformers decoder whose attention modules have q_proj, k_proj, v_proj, o_proj and layer_idx.
        config: the configuration of the memory.
        dtype: dtype of the memory's weights. float32 also works with a 16-bit or quantised backbone.

    Returns:
        The names of the attention modules.

    Raises:
        TypeError: an argument is of another type.
        ValueError: the model is not supported or already has a memory. It is then unchanged.
    """
    return install_memories(model, build_memories(model, config, dtype))


def build_memories(model: nn.Module, config: DeltaMemConfig, dtype: torch.dtype) -> dict[str, DeltaMemory]:
    """Create a memory for each attention module, by the module's name, without changing the model."""
    check_model(model, config)
    if memory_layers(model):
        raise ValueError("the model already has a memory: remove it with detach_memory first")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError("the model does not fit: it must be a decoder, got an encoder-decoder model")
    memories, needs_weights = {}, config.output_init.startswith("base_slice")
    for name, attention in attention_layers(model, config):
        device = _device_of(attention, model)
        if device.type == "meta":
            raise ValueError(
                f"the model does not fit: {name} is on the meta device (offloaded weights are not supported)"
            )
        projections = {head: getattr(attention, f"{head}_proj") for head in HEADS}
        memories[name] = DeltaMemory(
            config,
            projections["q"].in_features,
            {head: projection.out_features for head, projection in projections.items()},
            {head: _weight_of(projection) for head, projection in projections.items()} if needs_weights else None,
            device=device,
            dtype=dtype,
        )
    return memories


def _weight_of(projection: nn.Module) -> object:
    """Return the weight of a projection, dequantised if it is a quantised tensor of torchao."""
    weight = getattr(projection, "weight", None)
    if isinstance(weight, Tensor) and type(weight).dequantize is not Tensor.dequantize:
        return weight.dequantize()
    return weight


def _device_of(*modules: nn.Module) -> torch.device:
    """Return the device of the first module with tensors. Quantised modules may have neither parameters nor buffers."""
    tensors = (x for module in modules for x in (*module.parameters(), *module.buffers()))
    return next((x.device for x in tensors), torch.device("cpu"))


def install_memories(model: nn.Module, memories: dict[str, DeltaMemory]) -> list[str]:
    """Extend the model by memories for the attention modules of these names. Return the names."""
    try:
        return _install_memories(model, memories)
    except BaseException:
        detach_memory(model)
        raise


def _install_memories(model: nn.Module, memories: dict[str, DeltaMemory]) -> list[str]:
    modules, attachment = dict(model.named_modules()), Attachment()
    stacks: dict[str, set[str]] = {}  # name of a stack: names of its lists of layers
    for name, memory in memories.items():
        attention: Any = modules[name]
        extend(attention, Attention)
        attention.corrected_projections = {}
        attention.delta_memory, attention.memory_attachment = memory, attachment
        extend_projections(attention, [f"{head}_proj" for head in HEADS if head in memory.config.delta_heads])
        place = _place_in_stack(modules, name)
        if place is not None:
            stack, layers, layer = place
            stacks.setdefault(stack, set()).add(layers)
            if not isinstance(modules[layer], Layer):
                extend(modules[layer], Layer)
    for name, module in modules.items():
        is_model = isinstance(module, PreTrainedModel) and any(memory_layers(module))
        mixins = (Stack,) * (name in stacks) + (Model,) * is_model
        if mixins and not isinstance(module, mixins):
            extend(module, *mixins)
        if name in stacks:
            stack_module: Any = module
            prefix = f"{name}." if name else ""
            stack_module.memory_attachment = attachment
            stack_module.memory_attentions = tuple(
                modules[attention] for attention in memories if attention.startswith(prefix)
            )
            stack_module.memory_lists = tuple(layers.removeprefix(prefix) for layers in sorted(stacks[name]))
            for layers in stack_module.memory_lists:
                carry_context(module.get_submodule(layers))
    return list(memories)


def detach_memory(model: nn.Module) -> None:
    """Remove the memory from a model and restore it to its state before `attach_memory`.

    Raises:
        RuntimeError: another library has changed the class of a module since. The model is then unchanged.
    """
    extended = [module for module in model.modules() if isinstance(module, Extension)]
    for module in extended:
        check_restorable(module)
    for _, attention in memory_layers(model):
        for projection in attention.corrected_projections.values():
            restore_projection(projection)
        del attention.delta_memory
    for module in extended:
        for name in ("memory_attachment", "memory_lists", "memory_attentions", "corrected_projections"):
            module.__dict__.pop(name, None)
        if isinstance(module, Extension):  # projections are restored
            restore(module)


def _place_in_stack(modules: dict[str, nn.Module], attention: str) -> tuple[str, str, str] | None:
    """Return the names of an attention module's stack, its list of layers, and its layer without wrappers.

    For `model.layers.0.self_attn` these are `model`, `model.layers` and `model.layers.0`. None if there is no list.
    """
    parts = attention.split(".")
    for end in range(len(parts) - 1, 0, -1):
        layers = ".".join(parts[: end - 1])
        if end > 1 and isinstance(modules[layers], nn.ModuleList):
            while parts[end] in WRAPPERS:
                end += 1
            return layers.rpartition(".")[0], layers, ".".join(parts[:end])
    return None
