"""What a layer's memory does between one token and the next, with all that does not change looked up beforehand.

A model's weights pass through the caches between two calls of a layer, and each object that Python touches comes from
memory again: in SmolLM2-135M the checks and look-ups of a step take three times as long as what it computes.
"""

from __future__ import annotations

from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ops._checks import FLOATS
from ..ops._library import nobody_listens
from ..ops.attention_correction import correct_into_unchecked
from ..ops.memory_decode import decode_unchecked

if TYPE_CHECKING:
    from .memory import DeltaMemory


class Decoding:
    """`DeltaMemory.step` and `DeltaMemory.correct` in place, for operands that the operators' checks would find nothing
    in: floating, of the right shapes, on one device, what is written dense. Others are left to the operators, and so
    are a trained scale and calls that somebody listens to."""

    def __init__(self, memory: DeltaMemory) -> None:
        self.config = config = memory.config
        self.parameters = tuple(memory._parameters.values())
        self.weights = memory._weights()
        self.device = memory._packed.device
        self.hidden, self.size = memory.hidden_size, (config.num_state_heads, config.rank)
        self.rule = (config.num_state_heads, config.normalize_qk, config.state_update_mode, -1)
        self.nothing: tuple[Any, ...] = (None,) * 6, (*self.rule, 1.0, 1e-6, 0, "")
        self.corrections: dict[str | None, tuple[Any, ...]] = {}
        for head in config.delta_heads if not config.trainable_delta_scale else ():
            weight, scale, norm, eps = memory._correction(head)
            self.corrections[head] = (weight, None, norm, None, None), (scale, eps, 0, ""), weight.shape[0]

    def holds(self, memory: DeltaMemory) -> bool:
        """Whether the memory still has the parameters that this was made of; their values may have changed."""
        now = memory._parameters
        return (
            self.config is memory.config
            and len(now) == len(self.parameters)
            and all(map(is_, now.values(), self.parameters))
            and memory._lie_packed()
        )

    def step(self, x: Tensor, state: Tensor, head: str | None, base: Tensor | None) -> Tensor | None:
        """As `DeltaMemory.step`; None where nothing was done."""
        rows = x.shape[0]
        if (
            x.shape != (rows, self.hidden)
            or state.shape != (rows, *self.size, self.size[1])
            or x.dtype not in FLOATS
            or state.dtype not in FLOATS
            or not state.is_contiguous()
            or not x.device == state.device == self.device
            or not nobody_listens(x)
        ):
            return None
        if base is None:
            operands, options = self.nothing
        else:
            correction = self.corrections.get(head)
            if correction is None or not self._fits(base, (rows, correction[2])):
                return None
            operands, options = (*correction[0], base), (*self.rule, *correction[1])
        return decode_unchecked(state, x, *self.weights, None, None, *operands, *options)[0]

    def correct(self, base: Tensor, reads: Tensor, head: str) -> bool:
        """As `DeltaMemory.correct` in place; False where nothing was done."""
        correction = self.corrections.get(head)
        if correction is None or not nobody_listens(base):
            return False
        operands, options, width = correction
        leading = base.shape[:-1]
        if reads.shape != (*leading, *self.size) or reads.dtype not in FLOATS or reads.device != self.device:
            return False
        if len(leading) > 2 or not self._fits(base, (*leading, width)) or torch._C._is_alias_of(base, reads):  # type: ignore[attr-defined]
            return False
        correct_into_unchecked(base, None, reads, *operands, *options)
        return True

    def _fits(self, base: Tensor, shape: tuple[int, ...]) -> bool:
        dense = base.is_contiguous() and base.dtype in FLOATS
        return dense and base.shape == shape and base.device == self.device
