"""`MemoryCall`: per-call overrides of a memory: initial states, whether tokens write, and the resulting states."""

from __future__ import annotations

import itertools
import warnings
from types import TracebackType

import torch
from torch import Tensor, nn

from ...operands.checks import INDICES, describe, fail
from .cache import LayerMemory
from .context import Attachment
from .layers import memory_layers
from .open_calls import enter, innermost, leave
from .states import check_states
from .statistics import LayerStatistics

_numbers = itertools.count(1)


class MemoryCall:
    """Context manager that sets initial states and writing for the model calls inside it, and collects the states::

        with MemoryCall(model, states) as call:
            loss = model(input_ids, labels=labels, use_cache=False).loss
        states = call.states

    A MemoryCall applies to the current thread and `async` task. Generation in another thread does not see it; use
    `set_memory` with a cache there. Do not `yield` inside the block: the code that runs meanwhile would be affected.

    Args:
        model: a model with a memory.
        states: layer index to `[B, H, R, R]`, the initial states of a call without a cache, or whose cache has no
            memory yet. None means zeros.
        write: False only reads the memory.
        message_ids: `[B, T]` int32 or int64, the message of each token, or -1 for none. For a memory that writes the
            means of messages or sentences. After the prompt, while tokens are generated one by one, every token writes.
        sentence_ids: `[B, T]`, the sentence of each token, counted through the whole call. Tokens without a message are
            in no sentence.
        statistics: if True, collect statistics of each layer.

    Attributes:
        states: layer index to the states after the latest call. They include later changes by the call's cache (drafts
            cropped, beams reordered). They carry gradients, except with reentrant checkpointing of the layers.
        statistics: layer index to `LayerStatistics` of the latest call: means of β and of what is kept, norms of the
            states, sizes of the corrections. Empty unless statistics were asked for.

    Raises:
        TypeError, ValueError: an argument does not fit the model or has the wrong type or shape.
    """

    def __init__(
        self,
        model: nn.Module,
        states: dict[int, Tensor] | None = None,
        *,
        write: bool = True,
        message_ids: Tensor | None = None,
        sentence_ids: Tensor | None = None,
        statistics: bool = False,
    ) -> None:
        layers = [attention for _, attention in memory_layers(model)]
        if not layers:
            raise ValueError("the model has no memory: call attach_memory first")
        self.number = next(_numbers)
        self.attachments: list[Attachment] = list({layer.memory_attachment: None for layer in layers})
        self.granularity = layers[0].delta_memory.config.memory_write_granularity
        if states is not None:
            check_states(model, states)
        for name, value in (("write", write), ("statistics", statistics)):
            if not isinstance(value, bool):
                fail(TypeError, name, "True or False", value)
        self.initial = states or {}
        self._latest: dict[int, Tensor | LayerMemory] = {}
        self.write = write
        self.measures = statistics
        self.statistics: dict[int, LayerStatistics] = {}
        self.segment_ids = self._combine_ids(message_ids, sentence_ids)
        self.num_segments = None
        if self.segment_ids is not None:
            self.num_segments = int(self.segment_ids.max()) + 1 if self.segment_ids.numel() else 0
        self.is_open = False
        self.outer: MemoryCall | None = None

    @property
    def states(self) -> dict[int, Tensor]:
        latest = {i: x.state if isinstance(x, LayerMemory) else x for i, x in self._latest.items()}
        return {index: state for index, state in latest.items() if state is not None}

    def record_state(self, index: int, state: Tensor, layer: LayerMemory | None) -> None:
        """Record the state after a layer's call, or `layer`, its memory in a cache, to follow later changes."""
        if self.is_open:
            self._latest[index] = state if layer is None else layer

    def record_statistics(self, index: int, statistics: LayerStatistics) -> None:
        """Record the statistics of a layer's call."""
        if self.is_open:
            self.statistics[index] = statistics

    def _combine_ids(self, message_ids: Tensor | None, sentence_ids: Tensor | None) -> Tensor | None:
        """Check the ids and return those of the segments that are written."""
        granularity = self.granularity
        for name, ids, use in (
            ("message_ids", message_ids, ("message_mean", "sentence_mean")),
            ("sentence_ids", sentence_ids, ("sentence_mean",)),
        ):
            if ids is None:
                continue
            if granularity not in use:
                raise ValueError(f"{name} must be None for a memory with memory_write_granularity {granularity!r}")
            if not isinstance(ids, Tensor) or ids.dtype not in INDICES or ids.ndim != 2:
                fail(TypeError, name, "int32 or int64 [B, T]", ids)
        if sentence_ids is None:
            if granularity == "sentence_mean" and message_ids is not None:
                raise ValueError("sentence_ids must be given for a memory that writes sentences, got only message_ids")
            return message_ids
        if message_ids is None:
            return sentence_ids
        if message_ids.shape != sentence_ids.shape:
            raise ValueError(
                f"sentence_ids must have the shape of message_ids, {list(message_ids.shape)}, "
                f"got {describe(sentence_ids)}"
            )
        return torch.where(message_ids < 0, -1, sentence_ids)

    def __enter__(self) -> MemoryCall:
        if self.is_open:
            raise RuntimeError("this MemoryCall is already open")
        self.is_open, self.outer = True, innermost()
        enter(self)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.is_open = False
        self._latest = dict(self.states)  # the cache may be used further
        if innermost() is self:
            outer, self.outer = self.outer, None
            while outer is not None and not outer.is_open:
                outer = outer.outer
            leave(self, outer)
        else:
            leave(self, innermost())
            if kind is None:
                raise RuntimeError(
                    "a MemoryCall was closed before another one that was opened inside it, as happens if its `with` "
                    "block contains a `yield`. Calls of the model since then have used the states of the other "
                    "MemoryCall"
                )
        if kind is None and not self._latest:
            warnings.warn(
                "deltamem_kernels: the model was not called inside this MemoryCall (other threads do not see it)",
                stacklevel=2,
            )


def active_call(attachment: Attachment) -> MemoryCall | None:
    """Return the innermost open MemoryCall of the model that an attached memory belongs to."""
    call = innermost()
    while call is not None and not (call.is_open and any(of is attachment for of in call.attachments)):
        call = call.outer
    return call
