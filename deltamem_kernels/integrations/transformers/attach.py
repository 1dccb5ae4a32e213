"""`attach_memory`: install hooks on a model's attention modules that read and write a memory and apply corrections."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...nn import DeltaMemConfig, DeltaMemory
from ...nn.config import HEADS
from ...nn.writes import Writes
from .cache import LayerMemory, Step, layer_memory
from .cache_keyword import given_cache
from .call import CONTEXT_KEYWORD, MemoryCall, StackContext, active_call, pass_context
from .layers import attention_layers, memory_layers
from .masks import cached_token_mask


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
        ValueError: the model is not supported or already has a memory. It is then unchanged.
    """
    return install_memories(model, build_memories(model, config, dtype))


def build_memories(model: nn.Module, config: DeltaMemConfig, dtype: torch.dtype) -> dict[str, DeltaMemory]:
    """Create a memory for each attention module, by the module's name, without changing the model."""
    if memory_layers(model):
        raise ValueError("the model already has a memory: remove it with detach_memory first")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError("the model does not fit: it must be a decoder, got an encoder-decoder model")
    memories = {}
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
            {head: getattr(projection, "weight", None) for head, projection in projections.items()},
            device=device,
            dtype=dtype,
        )
    return memories


def _device_of(*modules: nn.Module) -> torch.device:
    """Return the device of the first module with tensors. Quantised modules may have neither parameters nor buffers."""
    tensors = (x for module in modules for x in (*module.parameters(), *module.buffers()))
    return next((x.device for x in tensors), torch.device("cpu"))


def install_memories(model: nn.Module, memories: dict[str, DeltaMemory]) -> list[str]:
    """Install memories and their hooks in the attention modules of these names. Return the names."""
    modules = dict(model.named_modules())
    for name, memory in memories.items():
        attention = modules[name]
        attention.delta_memory = memory
        attention.register_forward_pre_hook(_before_attention, with_kwargs=True)
        attention.register_forward_hook(_after_attention, always_call=True)
        corrected = {f"{head}_proj": hook for head, hook in CORRECTIONS.items() if head in memory.config.delta_heads}
        for projection, hook in corrected.items():
            getattr(attention, projection).register_forward_hook(hook)
        attention.corrected_projections = tuple((name, getattr(attention, name)) for name in corrected)
    for stack in _layer_stacks(modules, list(memories)):
        stack.register_forward_pre_hook(pass_context, with_kwargs=True)
    return list(memories)


def detach_memory(model: nn.Module) -> None:
    """Remove the memory from a model and restore it to its state before `attach_memory`."""
    layers = memory_layers(model)
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number in [n for n, hook in hooks.items() if hook in HOOKS]:
                del hooks[number]
                for marks in (
                    module._forward_pre_hooks_with_kwargs,
                    module._forward_hooks_with_kwargs,
                    module._forward_hooks_always_called,
                ):
                    marks.pop(number, None)
    for _, attention in layers:
        del attention.delta_memory, attention.corrected_projections


def _layer_stacks(modules: dict[str, nn.Module], names: list[str]) -> list[nn.Module]:
    """Return the modules that own the lists of layers: `model` for `model.layers.0.self_attn`."""
    lists = {name.rsplit(".", 2)[0] for name in names if name.count(".") >= 2}
    return [modules[n.rpartition(".")[0]] for n in lists if isinstance(modules[n], nn.ModuleList)]


@dataclass(slots=True)
class LayerCall:
    """A running call of an attention module."""

    attention: Any
    memory: DeltaMemory
    layer: LayerMemory | None
    """The layer's memory in the cache, if the call has a cache."""
    call: MemoryCall | None
    write: bool
    x: Tensor
    """The hidden states, `[B, T, hidden]`."""
    before: Tensor | None
    """The state before the call. None means zeros."""
    after: Tensor
    """The state after the call. A decoding step (one token) updates it in place."""
    slots: Tensor | None = None
    """For a decoding step, the index of each row's state in `after`, or -1 for padding. None if no row is padding."""
    reads: Tensor | None = None
    """None in a decoding step until the first correction, which is computed together with the reads."""
    writes: Writes | None = None

    def step(self, head: str | None = None, base: Tensor | None = None) -> None:
        """Run the decoding step and correct the output `base` of a projection in place."""
        x, base = self.x.squeeze(1), None if base is None else base.squeeze(1)
        self.reads = self.memory.step(x, self.after, slots=self.slots, head=head, base=base).unsqueeze(1)


class _CallStack(threading.local):
    def __init__(self) -> None:
        self.calls: list[LayerCall] = []


_stack = _CallStack()
_no_context = StackContext(None, None)


def _before_attention(attention: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Hook of an attention module: read the memory, or prepare a decoding step."""
    context: StackContext = kwargs.get(CONTEXT_KEYWORD, _no_context)
    call, starts = context.call or active_call(attention), context.starts
    x: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    batch, tokens, _ = x.shape
    memory = attention._modules["delta_memory"]  # attribute access through nn.Module takes half a microsecond longer
    for name, projection in attention.corrected_projections:
        if attention._modules[name] is not projection:
            raise RuntimeError(
                f"{name} of layer {attention.layer_idx} was replaced after attach_memory and would not be corrected: "
                "call detach_memory and attach the memory again"
            )
    cache, write = given_cache(kwargs), call is None or call.write
    layer = None if cache is None else layer_memory(cache, attention.layer_idx)
    state = None if layer is None else layer.state
    if state is None and call is not None and call.initial:
        state = call.initial[attention.layer_idx]
    if state is not None:
        if state.shape[0] != batch:
            raise ValueError(
                f"the memory has states of {state.shape[0]} sequences, but the model is called with a batch of "
                f"{batch}: for beams or several answers per prompt, repeat the states with repeat_interleave"
            )
        if state.device != x.device:
            state = state.to(x.device)
    mask = _mask(attention, batch, tokens, cache, kwargs.get("attention_mask"))
    segments = _segments(memory.config, call, x, decoding=tokens == 1 and cache is not None) if write else {}
    if tokens == 1 and not segments and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        slots = None if mask is None else torch.where(mask[:, 0], torch.arange(batch, device=mask.device), -1)
        after = memory.zeros(x) if state is None else state.clone()
        current = LayerCall(attention, memory, layer, call, write, x, state, after, slots)
    else:
        if starts is not None:  # position_ids may have one row for the whole batch
            starts = starts.to(x.device).expand(batch, tokens)
            if segments and starts.device.type != "cpu":  # check for packed sequences without synchronising
                torch._assert_async(
                    ~starts[:, 1:].any(), "message_ids and sentence_ids do not support packed sequences"
                )
                starts = None
        reads, after, writes = memory.read(x, state, mask=mask, write=write, starts=starts, **segments)
        current = LayerCall(attention, memory, layer, call, write, x, state, after, None, reads, writes)
    _stack.calls.append(current)
    if context is _no_context:
        return None
    return args, {name: value for name, value in kwargs.items() if name != CONTEXT_KEYWORD}


def _mask(attention: Any, batch: int, tokens: int, cache: Any, attention_mask: Any) -> Tensor | None:
    if attention_mask is None:
        return None
    past = 0
    if cache is not None:
        past = cache.get_seq_length(attention.layer_idx)
    elif isinstance(attention_mask, Tensor):
        past = attention_mask.shape[-1] - tokens
    return cached_token_mask(attention_mask, batch, tokens, past)


def _after_attention(attention: Any, args: tuple, output: Any) -> None:
    """Hook of an attention module: store the new state, unless the attention raised and has no output."""
    if not _stack.calls or _stack.calls[-1].attention is not attention:
        return
    current = _stack.calls.pop()
    if output is None:
        return
    if current.reads is None:
        current.step()
    after = current.after
    if not current.write:
        after = torch.zeros_like(after) if current.before is None else current.before
    if current.layer is not None:
        current.layer.advance(after, Step(current.x.shape[1], current.before, current.writes, current.write))
    if current.call is not None:
        current.call.record_state(attention.layer_idx, after, current.layer)


def _correct(head: str, projection: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
    """Hook of a projection: return the corrected output, or None if it was corrected in place or is not corrected."""
    if not _stack.calls:
        return None
    current = _stack.calls[-1]
    if current.attention._modules.get(f"{head}_proj") is not projection:
        return None
    in_place = not torch.is_grad_enabled() and not (args and output is args[0])
    if current.reads is not None:
        return current.memory.correct(output, current.reads, head, out=output if in_place else None)
    corrected = output if in_place else output.clone()
    current.step(head, corrected)
    return corrected


def _correct_q(projection: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
    return _correct("q", projection, args, output)


def _correct_k(projection: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
    return _correct("k", projection, args, output)


def _correct_v(projection: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
    return _correct("v", projection, args, output)


def _correct_o(projection: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
    return _correct("o", projection, args, output)


CORRECTIONS: dict[str, Callable] = {"q": _correct_q, "k": _correct_k, "v": _correct_v, "o": _correct_o}
HOOKS = (_before_attention, _after_attention, pass_context, *CORRECTIONS.values())


def _segments(config: DeltaMemConfig, call: MemoryCall | None, x: Tensor, *, decoding: bool) -> dict[str, Any]:
    """Return the segment arguments of `DeltaMemory.read`; empty if every token writes."""
    if config.memory_write_granularity == "token":
        return {}
    ids = None if call is None else call.segment_ids
    if ids is None:
        _warn_of_tokens(config.memory_write_granularity)
        return {}
    if ids.shape != x.shape[:2]:
        if decoding:  # the ids belong to the prompt
            return {}
        raise ValueError(
            f"message_ids and sentence_ids must have the shape of the tokens, {list(x.shape[:2])}, "
            f"got {list(ids.shape)}"
        )
    return {"segment_ids": ids.to(x.device), "num_segments": call.num_segments}  # type: ignore[union-attr]


@functools.cache
def _warn_of_tokens(granularity: str) -> None:
    warnings.warn(
        f"deltamem_kernels: memory_write_granularity is {granularity!r}, but no ids were given with MemoryCall: every "
        "token writes",
        stacklevel=2,
    )
