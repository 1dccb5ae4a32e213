"""One call of an attention module with a memory: read and write the memory, correct the projections, keep the state."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ...nn import DeltaMemConfig
from ...nn.memory import is_plain
from .cache import LayerMemory, Step, layer_memory
from .cache_keyword import given_cache
from .call import MemoryCall, active_call
from .context import NO_CONTEXT, StackContext
from .statistics import Measurement


class LayerCall:
    """A running call of an attention module.

    One call of the memory computes the reads and the new state, and while decoding the corrections too. The projections
    then add their corrections. In a longer call each correction is computed where it is added, fused with the addition.
    """

    __slots__ = (
        "after", "attention", "before", "call", "corrected", "corrections", "gates", "layer", "mask", "measured",
        "memory", "reads", "tokens", "write", "writes",
    )  # fmt: skip

    def __init__(self, attention: Any, context: StackContext, x: Tensor, kwargs: dict[str, Any]) -> None:
        self.attention = attention
        self.tokens = x.shape[1]
        self.call = call = active_call(attention.memory_attachment) if context is NO_CONTEXT else context.call
        cache = given_cache(kwargs)
        self.layer: LayerMemory | None = None if cache is None else layer_memory(cache, attention.layer_idx)
        self.before = self._state(x)
        self.mask, attention_mask = None, kwargs.get("attention_mask")
        if attention_mask is not None:
            self.mask = layer_mask(attention, context, x, cache, attention_mask)
        self.measured = None if call is None or not call.measures else Measurement(self.mask)
        self.corrected: set[str] = set()
        self.memory: Any = attention._modules["delta_memory"]
        self._run(context, x, decoding=self.tokens == 1 and cache is not None)

    def _run(self, context: StackContext, x: Tensor, *, decoding: bool) -> None:
        """Read and write the memory."""
        memory, call = self.memory, self.call
        self.write = call is None or call.write
        options: dict[str, Any] = {"mask": self.mask, "write": self.write}
        if self.write and memory.config.memory_write_granularity != "token":
            options |= _segments(memory.config, call, x, decoding=decoding)
        if context.starts is not None:
            options["starts"] = _starts(context.starts, x, "segment_ids" in options)
        if self.measured is not None:
            options["return_gates"] = True
        self.corrections: dict[str, Tensor] | None = None
        if self.tokens == 1 or self.measured is not None or not is_plain(memory):
            self.reads, self.after, self.writes, self.corrections, self.gates = memory(x, self.before, **options)
        else:
            self.reads, self.after, self.writes = memory.read(x, self.before, **options)

    def correct(self, projection: Any, output: Tensor, in_place: bool) -> Tensor:
        """Return the corrected output of a projection."""
        name = projection.memory_name
        self.corrected.add(name)
        head = name[0]
        if self.corrections is None:
            return self.memory.correct(output, self.reads, head, out=output if in_place else None)
        correction = self.corrections[head]
        if self.measured is not None:
            self.measured.ratios[head] = self.measured.ratio(correction, output)
        return add_correction(name, output, correction, in_place)

    def finish(self) -> None:
        """Keep the state after the attention has run.

        Raises:
            RuntimeError: a projection that the memory corrects was not called.
        """
        attention, layer, call = self.attention, self.layer, self.call
        check_all_corrected(attention, self.corrected)
        if layer is not None:
            layer.advance(self.after, Step(self.tokens, self.before, self.writes, self.write))
        if call is not None:
            call.record_state(attention.layer_idx, self.after, layer)
            if self.measured is not None:
                call.record_statistics(attention.layer_idx, self.measured.statistics(self.gates, self.after))

    def _state(self, x: Tensor) -> Tensor | None:
        """Return the state before the call. None means zeros."""
        state = None if self.layer is None else self.layer.state
        if state is None and self.call is not None and self.call.initial:
            index = self.attention.layer_idx
            if index not in self.call.initial:
                raise ValueError(f"the MemoryCall has no state of layer {index}: create it with the whole model")
            state = self.call.initial[index]
        if state is None:
            return None
        check_batch(state, x)
        return state if state.device == x.device else state.to(x.device)


def check_batch(state: Tensor, x: Tensor) -> None:
    """Raise ValueError unless there is a state for each row of x."""
    if state.shape[0] != x.shape[0]:
        raise ValueError(
            f"the memory has states of {state.shape[0]} sequences, but the model is called with a batch of "
            f"{x.shape[0]}: for beams or several answers per prompt, repeat the states with repeat_interleave"
        )


def layer_mask(attention: Any, context: StackContext, x: Tensor, cache: Any, attention_mask: Any) -> Tensor | None:
    """Return which tokens of a layer's call are not padding, `[B, T]`, or None if none is."""
    batch, tokens, _ = x.shape
    past: int | Tensor = 0
    if cache is not None:
        past = cache.get_seq_length(attention.layer_idx)
    elif isinstance(attention_mask, Tensor):
        past = attention_mask.shape[-1] - tokens
    return context.token_mask(attention_mask, batch, tokens, past)


def add_correction(name: str, output: Tensor, correction: Tensor, in_place: bool) -> Tensor:
    """Add a correction to the output of the projection of this name."""
    if output.shape != correction.shape:
        raise ValueError(
            f"{name} must return {list(correction.shape)} in a layer with a memory, got {list(output.shape)}"
        )
    return output.add_(correction) if in_place else (output + correction).to(output.dtype)


def check_all_corrected(attention: Any, names: Collection[str]) -> None:
    """Raise RuntimeError if a projection that the memory corrects was not called."""
    if len(names) < len(attention.corrected_projections):
        name = min(attention.corrected_projections.keys() - set(names))
        raise RuntimeError(
            f"{name} of layer {attention.layer_idx} was not called, so the memory could not correct it: leave "
            f"{name[0]!r} out of delta_heads, or this layer out of target_layers"
        )


def _starts(starts: Tensor, x: Tensor, has_segments: bool) -> Tensor | None:
    """Return where packed sequences begin, for each row of x."""
    starts = starts.to(x.device).expand(x.shape[0], x.shape[1])  # position_ids may have one row for the whole batch
    if has_segments and starts.device.type != "cpu":  # check without synchronising
        torch._assert_async(~starts[:, 1:].any(), "message_ids and sentence_ids do not support packed sequences")
        return None
    return starts


def _segments(config: DeltaMemConfig, call: MemoryCall | None, x: Tensor, *, decoding: bool) -> dict[str, Any]:
    """Return the segment arguments of `DeltaMemory.read`; empty if every token writes."""
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
