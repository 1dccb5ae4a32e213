"""A decoding step of an attention module with a memory: what `LayerCall` does, for one token in one native call.

Between two layers' memories the backbone streams its weights through the caches, so that a step costs what it touches:
each Python function about a microsecond. A step therefore has a class of its own that does only what a step needs. It
is used while no gradients are recorded, outside of a MemoryCall; `LayerCall` gives the same results.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...operands import LayerStepOperands
from ...ops.layer_step import layer_step
from .cache import LayerMemory, Step, layer_memory
from .cache_keyword import given_cache
from .context import StackContext
from .layer_call import check_all_corrected, check_batch, corrected, layer_mask


class StepCall:
    """A running call of an attention module with one token."""

    __slots__ = ("after", "attention", "before", "corrected", "corrections", "layer")

    def __init__(self, attention: Any, context: StackContext, x: Tensor, kwargs: dict[str, Any]) -> None:
        self.attention = attention
        cache = given_cache(kwargs)
        self.layer: LayerMemory | None = None if cache is None else layer_memory(cache, attention.layer_idx)
        self.before = state = None if self.layer is None else self.layer.state
        if state is not None:
            check_batch(state, x)
            if state.device != x.device:
                state = state.to(x.device)
        mask = kwargs.get("attention_mask")
        if mask is not None:
            mask = layer_mask(attention, context, x, cache, mask)
        weights = attention._modules["delta_memory"].collect_weights().weights
        _, self.after, self.corrections = layer_step(LayerStepOperands(x, state, mask, weights))
        self.corrected: list[str] = []

    def correct(self, projection: Any, output: Tensor, in_place: bool) -> Tensor:
        """Return the corrected output of a projection."""
        name = projection.memory_name
        self.corrected.append(name)
        return corrected(name, output, self.corrections[projection.memory_index], in_place)

    def finish(self) -> None:
        """Keep the state after the attention has run."""
        check_all_corrected(self.attention, self.corrected)
        if self.layer is not None:
            self.layer.advance(self.after, Step(1, self.before, None, True))
