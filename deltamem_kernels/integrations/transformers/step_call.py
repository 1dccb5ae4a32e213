"""A decoding step of an attention module with a memory: what `LayerCall` does, for one token in one native call.

Between the memories of two layers, the backbone streams its weights through the caches. Python functions are then slow
to call, about three microseconds each, so a step has a class of its own, which calls few. It is used while no gradients
are recorded, outside of a MemoryCall. `LayerCall` gives the same results.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...ops.layer_step import layer_step
from .cache import NAME, LayerMemory, Step, layer_memory
from .context import StackContext
from .layer_call import add_correction, check_all_corrected, check_batch, layer_mask


class StepCall:
    """A running call of an attention module with one token."""

    __slots__ = ("after", "attention", "before", "corrected", "corrections", "layer")

    def __init__(self, attention: Any, context: StackContext, x: Tensor, kwargs: dict[str, Any]) -> None:
        self.attention = attention
        cache = kwargs.get("cache")
        if cache is None:
            cache = kwargs.get("past_key_values")
        layer: LayerMemory | None = None
        if cache is not None:
            layer = getattr(cache, NAME, {}).get(attention.layer_idx) or layer_memory(cache, attention.layer_idx)
        state = None if layer is None else layer.state
        if state is not None:
            if state.shape[0] != x.shape[0]:
                check_batch(state, x)
            if state.device != x.device:
                state = state.to(x.device)
        mask = kwargs.get("attention_mask")
        if mask is not None:
            mask = layer_mask(attention, context, x, cache, mask)
        self.layer, self.before = layer, state
        weights = attention._modules["delta_memory"].collect_weights().weights
        _, self.after, self.corrections = layer_step(x, state, mask, weights)
        self.corrected: list[str] = []

    def correct(self, projection: Any, output: Tensor, in_place: bool) -> Tensor:
        """Return the corrected output of a projection."""
        self.corrected.append(projection.memory_name)
        correction = self.corrections[projection.memory_index]
        if in_place and output.shape == correction.shape:
            return output.add_(correction)
        return add_correction(projection.memory_name, output, correction, in_place)

    def finish(self) -> None:
        """Keep the state after the attention has run."""
        if len(self.corrected) != len(self.corrections):
            check_all_corrected(self.attention, self.corrected)
        if self.layer is not None:
            self.layer.advance(self.after, Step(1, self.before, None, True))
