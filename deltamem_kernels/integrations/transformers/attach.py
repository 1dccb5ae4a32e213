"""`attach_memory`: hooks around the attention modules of a model, which read, correct and write."""

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
from ...nn.decoding import Decoding
from ...nn.writes import Writes
from .cache import LayerMemory, Step, layer_of
from .cache_keyword import given_cache
from .call import KEYWORD, HandedDown, MemoryCall, call_for, hand_down
from .layers import attention_layers, memory_layers
from .masks import latest_mask


def attach_memory(model: nn.Module, config: DeltaMemConfig, *, dtype: torch.dtype = torch.float32) -> list[str]:
    """Gives each attention layer of a model a memory, its submodule `delta_memory`. The model is then used as before.

    The states live in the cache of a request, and start from zeros. Nothing is frozen here:
    `model.requires_grad_(False)` before leaves the memory as what is trained.

    Args:
        model: of transformers, a decoder whose attention has q_proj, k_proj, v_proj, o_proj and layer_idx.
        config: what the memory is.
        dtype: of its weights. float32 also beside a backbone of 16 bits or a quantised one.

    Returns:
        The names of the attention modules.

    Raises:
        ValueError: the model does not fit, or has a memory; it stays as it was.
    """
    return install(model, build(model, config, dtype))


def build(model: nn.Module, config: DeltaMemConfig, dtype: torch.dtype) -> dict[str, DeltaMemory]:
    """The memory for each attention module, beside the model."""
    if memory_layers(model):
        raise ValueError("the model has a memory already: detach_memory takes it away")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError("the model does not fit: it is an encoder and a decoder, and a memory is for a decoder alone")
    memories = {}
    for name, attention in attention_layers(model, config):
        device = _device(attention, model)
        if device.type == "meta":
            raise ValueError(f"the model does not fit: {name} is on the meta device, as what is offloaded is")
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


def _device(*modules: nn.Module) -> torch.device:
    """Where the first of them that has tensors has them: quantised projections may hold theirs in other forms."""
    tensors = (x for module in modules for x in (*module.parameters(), *module.buffers()))
    return next((x.device for x in tensors), torch.device("cpu"))


def install(model: nn.Module, memories: dict[str, DeltaMemory]) -> list[str]:
    modules = dict(model.named_modules())
    for name, memory in memories.items():
        attention = modules[name]
        attention.delta_memory = memory
        attention.register_forward_pre_hook(_read, with_kwargs=True)
        attention.register_forward_hook(_finish, always_call=True)
        corrected = {f"{head}_proj": hook for head, hook in CORRECTIONS.items() if head in memory.config.delta_heads}
        for projection, hook in corrected.items():
            getattr(attention, projection).register_forward_hook(hook)
        attention._corrected = tuple((projection, getattr(attention, projection)) for projection in corrected)
    for stack in _stacks(modules, list(memories)):
        stack.register_forward_pre_hook(hand_down, with_kwargs=True)
    return list(memories)


def detach_memory(model: nn.Module) -> None:
    """Takes the memory away, and leaves the model as it was before `attach_memory`."""
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
        del attention.delta_memory, attention._corrected


def _stacks(modules: dict[str, nn.Module], names: list[str]) -> list[nn.Module]:
    """What owns the list that the layers are in: `model` for `model.layers.0.self_attn`."""
    lists = {name.rsplit(".", 2)[0] for name in names if name.count(".") >= 2}
    return [modules[n.rpartition(".")[0]] for n in lists if isinstance(modules[n], nn.ModuleList)]


@dataclass(slots=True)
class _Open:
    """A call of an attention module that is under way."""

    attention: Any
    memory: DeltaMemory
    layer: LayerMemory | None
    call: MemoryCall | None
    write: bool
    x: Tensor
    before: Tensor | None
    after: Tensor
    decoding: Decoding | None = None
    """Of a call of one token, which goes through the memory in one call and in place."""
    slots: Tensor | None = None
    """Of a decoding step: where in `after` each row's state is, -1 for padding; None where each row counts."""
    reads: Tensor | None = None
    """None until the first correction of a decoding step, which is one call with it."""
    writes: Writes | None = None

    def step(self, head: str | None = None, base: Tensor | None = None) -> None:
        """The token's way through the memory, and the correction of a projection's output, in place."""
        x, base, reads = self.x.squeeze(1), None if base is None else base.squeeze(1), None
        if self.slots is None and self.decoding is not None:
            reads = self.decoding.step(x, self.after, head, base)
        if reads is None:
            reads = self.memory.step(x, self.after, slots=self.slots, head=head, base=base)
        self.reads = reads.unsqueeze(1)


class _Stack(threading.local):
    def __init__(self) -> None:
        self.calls: list[_Open] = []


_stack = _Stack()
_nothing = HandedDown(None, None)


def _read(attention: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    handed: HandedDown = kwargs.get(KEYWORD, _nothing)
    call, starts = handed.call or call_for(attention), handed.starts
    x: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    batch, tokens, _ = x.shape
    memory = attention._modules["delta_memory"]  # past the module's own way, half a microsecond
    for name, projection in attention._corrected:
        if attention._modules[name] is not projection:
            raise RuntimeError(
                f"{name} of layer {attention.layer_idx} was replaced after attach_memory, and would not be corrected: "
                "detach_memory, and attach it again"
            )
    cache, write = given_cache(kwargs), call is None or call.write
    layer = None if cache is None else layer_of(cache, attention.layer_idx)
    state = None if layer is None else layer.state
    if state is None and call is not None and call.initial:
        state = call.initial[attention.layer_idx]
    if state is not None:
        if state.shape[0] != batch:
            raise ValueError(
                f"the memory's states are of {state.shape[0]} sequences, and the model is called with {batch}: for "
                "beams, or several answers to a prompt, repeat_interleave them"
            )
        if state.device != x.device:
            state = state.to(x.device)
    mask = _mask(attention, batch, tokens, cache, kwargs.get("attention_mask"))
    segments = _segments(memory.config, call, x, decoding=tokens == 1 and cache is not None) if write else {}
    decoding = None
    if tokens == 1 and not segments:
        decoding = memory.decoding()
    if decoding is not None:
        slots = None if mask is None else torch.where(mask[:, 0], torch.arange(batch, device=mask.device), -1)
        after = memory.zeros(x) if state is None else state.clone()
        now = _Open(attention, memory, layer, call, write, x, state, after, decoding, slots)
    else:
        if starts is not None:  # positions may be one row for all
            starts = starts.to(x.device).expand(batch, tokens)
            if segments and starts.device.type != "cpu":  # where one cannot see whether there are several
                torch._assert_async(~starts[:, 1:].any(), "messages and sentences are a row's: no packed sequences")
                starts = None
        reads, after, writes = memory.read(x, state, mask=mask, write=write, starts=starts, **segments)
        now = _Open(attention, memory, layer, call, write, x, state, after, None, None, reads, writes)
    _stack.calls.append(now)
    if handed is _nothing:
        return None
    return args, {name: value for name, value in kwargs.items() if name != KEYWORD}


def _mask(attention: Any, batch: int, tokens: int, cache: Any, attention_mask: Any) -> Tensor | None:
    if attention_mask is None:
        return None
    past = 0
    if cache is not None:
        past = cache.get_seq_length(attention.layer_idx)
    elif isinstance(attention_mask, Tensor):
        past = attention_mask.shape[-1] - tokens
    return latest_mask(attention_mask, batch, tokens, past)


def _finish(attention: Any, args: tuple, output: Any) -> None:
    """Keeps the state; not where the attention failed, and has no output."""
    if not _stack.calls or _stack.calls[-1].attention is not attention:
        return
    now = _stack.calls.pop()
    if output is None:
        return
    if now.reads is None:
        now.step()
    after = now.after
    if not now.write:
        after = torch.zeros_like(after) if now.before is None else now.before
    if now.layer is not None:
        now.layer.advance(after, Step(now.x.shape[1], now.before, now.writes, now.write))
    if now.call is not None:
        now.call.left(attention.layer_idx, after, now.layer)


def _correct(head: str, projection: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
    if not _stack.calls:
        return None
    now = _stack.calls[-1]
    if now.attention._modules.get(f"{head}_proj") is not projection:
        return None
    in_place = not torch.is_grad_enabled() and not (args and output is args[0])
    if now.reads is not None:
        if in_place and now.decoding is not None and now.decoding.correct(output, now.reads, head):
            return None
        return now.memory.correct(output, now.reads, head, out=output if in_place else None)
    corrected = output if in_place else output.clone()
    now.step(head, corrected)
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
HOOKS = (_read, _finish, hand_down, *CORRECTIONS.values())


def _segments(config: DeltaMemConfig, call: MemoryCall | None, x: Tensor, *, decoding: bool) -> dict[str, Any]:
    """The messages or sentences that a call writes; none where each token does."""
    if config.memory_write_granularity == "token":
        return {}
    ids = None if call is None else call.segment_ids
    if ids is None:
        _warn_of_tokens(config.memory_write_granularity)
        return {}
    if ids.shape != x.shape[:2]:
        if decoding:  # the ids are the prompt's
            return {}
        raise ValueError(
            f"message_ids and sentence_ids must be {list(x.shape[:2])} as the tokens are, got {list(ids.shape)}"
        )
    return {"segment_ids": ids.to(x.device), "num_segments": call.num_segments}  # type: ignore[union-attr]


@functools.cache
def _warn_of_tokens(granularity: str) -> None:
    warnings.warn(
        f"deltamem_kernels: memory_write_granularity is {granularity!r} and no ids were given (MemoryCall): each token "
        "writes",
        stacklevel=2,
    )
