"""`MemoryCall`: what the calls of a model do with its memory, where that is not the usual."""

from __future__ import annotations

import contextvars
import warnings
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...ops._checks import INDICES, describe, fail
from .cache import LayerMemory
from .layers import memory_layers
from .masks import new_call
from .packing import sequence_starts
from .states import check_states

KEYWORD = "delta_memory_call"  # on its way from the stack of layers to each attention module

_innermost: contextvars.ContextVar[MemoryCall | None] = contextvars.ContextVar("innermost", default=None)


class MemoryCall:
    """For the calls of a model inside of `with`: where they start, whether they write, and the states they leave::

        with MemoryCall(model, states) as call:
            loss = model(input_ids, labels=labels, use_cache=False).loss
        states = call.states

    It holds for this thread and this `async` task: generation in another thread does not see it (`set_memory` with a
    cache of one's own does that). Do not `yield` inside of it: what runs meanwhile would be inside too.

    Args:
        model: a model with a memory.
        states: what a request starts from that has no cache, or one without a memory: `[B, H, R, R]` by the layers'
            index. None means zeros.
        write: False reads the memory and leaves it as it is.
        message_ids: `[B, T]` int32 or int64, the message of each token, or -1, for a memory that writes messages' or
            sentences' means. Behind them, while a request is generated token by token, each token writes.
        sentence_ids: likewise, the sentence of each token, counted through the call. A token without a message has no
            sentence.

    Attributes:
        states: by the layers' index, the states behind the latest call, and what its cache has made of them since
            (drafts taken back, beams reordered). They carry gradients (not with reentrant checkpointing of the layers).

    Raises:
        TypeError, ValueError: an argument that does not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        states: dict[int, Tensor] | None = None,
        *,
        write: bool = True,
        message_ids: Tensor | None = None,
        sentence_ids: Tensor | None = None,
    ) -> None:
        self.layers = [attention for _, attention in memory_layers(model)]
        self._of_model = {id(attention) for attention in self.layers}
        if not self.layers:
            raise ValueError("the model has no memory: attach_memory gives it one")
        if states is not None:
            check_states(model, states)
        if not isinstance(write, bool):
            fail(TypeError, "write", "True or False", write)
        self.initial = states or {}
        self._latest: dict[int, Tensor | LayerMemory] = {}
        self.write = write
        self.segment_ids = self._segments(message_ids, sentence_ids)
        self.num_segments = None
        if self.segment_ids is not None:
            self.num_segments = int(self.segment_ids.max()) + 1 if self.segment_ids.numel() else 0
        self.is_open = False
        self._outer: MemoryCall | None = None

    @property
    def states(self) -> dict[int, Tensor]:
        latest = {i: x.state if isinstance(x, LayerMemory) else x for i, x in self._latest.items()}
        return {index: state for index, state in latest.items() if state is not None}

    def left(self, index: int, state: Tensor, layer: LayerMemory | None) -> None:
        """Told by a layer's call; `layer` is its memory in a cache."""
        if self.is_open:
            self._latest[index] = state if layer is None else layer

    def _segments(self, message_ids: Tensor | None, sentence_ids: Tensor | None) -> Tensor | None:
        granularity = self.layers[0].delta_memory.config.memory_write_granularity
        for name, ids, use in (
            ("message_ids", message_ids, ("message_mean", "sentence_mean")),
            ("sentence_ids", sentence_ids, ("sentence_mean",)),
        ):
            if ids is None:
                continue
            if granularity not in use:
                raise ValueError(f"{name} has no use for a memory whose memory_write_granularity is {granularity!r}")
            if not isinstance(ids, Tensor) or ids.dtype not in INDICES or ids.ndim != 2:
                fail(TypeError, name, "int32 or int64 [B, T]", ids)
        if sentence_ids is None:
            if granularity == "sentence_mean" and message_ids is not None:
                raise ValueError("sentence_ids must be given for a memory that writes sentences, got message_ids alone")
            return message_ids
        if message_ids is None:
            return sentence_ids
        if message_ids.shape != sentence_ids.shape:
            raise ValueError(f"sentence_ids must be of message_ids' shape, got {describe(sentence_ids)}")
        return torch.where(message_ids < 0, -1, sentence_ids)

    def __enter__(self) -> MemoryCall:
        if self.is_open:
            raise RuntimeError("this MemoryCall is open already")
        self.is_open, self._outer = True, _innermost.get()
        _innermost.set(self)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.is_open = False
        self._latest = dict(self.states)  # a cache may go on
        if _innermost.get() is self:
            outer, self._outer = self._outer, None
            while outer is not None and not outer.is_open:
                outer = outer._outer
            _innermost.set(outer)
        elif kind is None:
            raise RuntimeError(
                "a MemoryCall was closed while one opened inside of it was open: a `with` over a `yield`, or two in "
                "turn? The model's calls since then used the states of the other one"
            )
        if kind is None and not self._latest:
            warnings.warn(
                "deltamem_kernels: no call of the model was made inside this MemoryCall; other threads do not see it",
                stacklevel=2,
            )


def call_for(attention: nn.Module) -> MemoryCall | None:
    """The innermost open call of the model that the layer belongs to."""
    call = _innermost.get()
    while call is not None and not (call.is_open and id(attention) in call._of_model):
        call = call._outer
    return call


class HandedDown(NamedTuple):
    """What the attention modules of a call have in common."""

    call: MemoryCall | None
    starts: Tensor | None
    """`[B or 1, T]` bool, of packed rows."""


def hand_down(stack: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Hook of the stack of layers. What checkpointed layers are called with, they are called with again in backward,
    when the `with` is over."""
    new_call()
    starts, call = sequence_starts(stack, args, kwargs), None
    if _innermost.get() is not None:
        call = next((call for _, attention in memory_layers(stack) if (call := call_for(attention))), None)
    return None if call is None and starts is None else (args, {**kwargs, KEYWORD: HandedDown(call, starts)})
