"""The states of a request, stored in the cache that holds its keys and values.

transformers has its own slots for recurrent states, but only in layers of other types (linear attention), which a
model's configuration selects and which cannot be cropped. The memory's states are therefore stored next to the layers.

The class of a cache that is passed to a model is replaced by a subclass with the memory's states. Copying, reordering,
selecting, cropping or resetting the cache then does the same to the states.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import cache_utils
from transformers.cache_utils import Cache, EncoderDecoderCache

from ...nn.writes import Writes
from .states import check_states

ROLLBACK = 128  # tokens that can always be cropped; the latest call can be cropped even if it has more

QUANTIZED = getattr(cache_utils, "BaseQuantizedLayer", cache_utils.QuantizedLayer)


class Step(NamedTuple):
    """One call of a layer, recorded so that it can be undone fully or in part."""

    tokens: int
    before: Tensor | None
    """The state before the call. None means zeros."""
    writes: Writes | None
    """The writes of each token. None if tokens did not write, or messages wrote their means."""
    wrote: bool

    def first(self, tokens: int) -> Step:
        """Return the call reduced to its first tokens."""
        return self._replace(tokens=tokens, writes=self.writes and self.writes.first(tokens))

    def state(self) -> Tensor | None:
        """Return the state after the call."""
        return self.before if self.writes is None or self.tokens == 0 else self.writes.onto(self.before)


class LayerMemory:
    """The state of one layer, and the latest calls, which can be undone."""

    def __init__(self, state: Tensor | None = None) -> None:
        self.state = state
        self.steps: deque[Step] = deque()
        self.recorded_tokens = 0
        """Number of tokens in `steps`."""

    def advance(self, state: Tensor, step: Step) -> None:
        """Set the state after a call and record the call."""
        self.state = state
        self.steps.append(step)
        self.recorded_tokens += step.tokens
        while self.recorded_tokens - self.steps[0].tokens >= ROLLBACK:
            self.recorded_tokens -= self.steps.popleft().tokens

    def check_crop(self, tokens: int) -> None:
        """Raise ValueError if the latest tokens cannot be undone."""
        for step in reversed(self.steps):
            if tokens < step.tokens and step.wrote and step.writes is None and tokens > 0:
                raise ValueError(f"a call that wrote messages can only be cropped as a whole, {step.tokens} tokens")
            tokens -= step.tokens
            if tokens <= 0:
                return
        if tokens > 0:
            raise ValueError(
                f"the memory can be cropped by at most {self.recorded_tokens} tokens, got "
                f"{self.recorded_tokens + tokens}: it records the writes of the latest {ROLLBACK} tokens or of the "
                "latest call, and none from before a reordering of the batch"
            )

    def crop(self, tokens: int) -> None:
        """Undo the latest tokens, which `check_crop` has checked."""
        self.recorded_tokens -= tokens
        while tokens > 0:
            step = self.steps.pop()
            rest = step.first(max(step.tokens - tokens, 0))
            tokens -= step.tokens - rest.tokens
            self.state = rest.state()
            if rest.tokens:
                self.steps.append(rest)

    def select(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch to the state. Earlier calls can no longer be undone."""
        self.state = None if self.state is None else change(self.state)
        self.steps.clear()
        self.recorded_tokens = 0


class MemoryCache:
    """Mixin for the class of a cache that applies its operations to the memory's states as well."""

    memory: dict[int, LayerMemory]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._select(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._select(lambda state: state[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._select(lambda state: state.repeat_interleave(repeats, dim=0))

    def crop(self, length: int) -> None:
        """Crop keys and values as transformers does, and undo the same number of tokens in the memory.

        Raises:
            ValueError: the memory cannot undo so many tokens, or the cache is quantised, which transformers cannot
                crop. The cache is then unchanged.
        """
        if any(isinstance(layer, QUANTIZED) for layer in self.layers):  # type: ignore[attr-defined]
            raise ValueError("a quantised cache cannot be cropped")
        cached = self.get_seq_length()  # type: ignore[attr-defined]
        for layer in self.memory.values():
            layer.check_crop(min(-length, cached) if length < 0 else cached - length if length else 0)
        super().crop(length)  # type: ignore[misc]
        for layer in self.memory.values():
            layer.crop(cached - self.get_seq_length())  # type: ignore[attr-defined]

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.memory.clear()

    def __reduce_ex__(self, protocol: object) -> tuple:
        return _unpickle, (type(self).__bases__[1], self.__dict__)  # pickle cannot find dynamically created classes

    def _select(self, change: Callable[[Tensor], Tensor]) -> None:
        for layer in self.memory.values():
            layer.select(change)


@functools.cache
def _memory_class(cls: type) -> type:
    """Return the subclass of a cache class that holds a memory."""
    return type(f"{cls.__name__}WithMemory", (MemoryCache, cls), {"__module__": __name__})


def _unpickle(cls: type, fields: dict) -> object:
    """Restore a cache with a memory from a pickle."""
    cache: Any = object.__new__(cls)
    cache.__dict__.update(fields)
    cache.__class__ = _memory_class(cls)
    return cache


def cache_memory(cache: object) -> dict[int, LayerMemory]:
    """Return the memory in a cache, by layer index. The cache's class is replaced so that it can hold a memory.

    Raises:
        TypeError: the argument is not a cache of a decoder.
        ValueError: the argument is the paged cache of `generate_batch`.
    """
    if isinstance(cache, MemoryCache):
        return cache.memory
    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
        from transformers.generation.continuous_batching import PagedAttentionCache  # imports its scheduler too

        if isinstance(cache, PagedAttentionCache):
            raise ValueError("a paged cache (generate_batch) cannot hold the states of a memory: use generate")
        raise TypeError(f"cache must be a Cache of transformers for one decoder, got {type(cache).__name__}")
    memory: dict[int, LayerMemory] = {}
    cache.__class__ = _memory_class(type(cache))  # type: ignore[arg-type]
    cache.memory = memory  # type: ignore[attr-defined]
    return memory


def layer_memory(cache: object, index: int) -> LayerMemory:
    """Return the memory of one layer in a cache. An empty one is created if there is none."""
    memory = cache.memory if isinstance(cache, MemoryCache) else cache_memory(cache)
    layer = memory.get(index)
    if layer is None:
        layer = memory[index] = LayerMemory()
    return layer


def get_memory(cache: Cache) -> dict[int, Tensor]:
    """Return the states in a cache: layer index to `[B, H, R, R]`, float32. Empty before the first call.

    Raises:
        TypeError: the argument is not a cache, for example the output of a model.
    """
    if not isinstance(cache, Cache):
        raise TypeError(f"cache must be a Cache of transformers, got {type(cache).__name__}")
    memory = cache.memory if isinstance(cache, MemoryCache) else {}
    return {index: layer.state for index, layer in memory.items() if layer.state is not None}


def set_memory(model: nn.Module, cache: Cache, states: dict[int, Tensor]) -> None:
    """Replace the states in a cache. With a new cache, the model has the memory but none of the earlier context.

    Args:
        model: the model with the memory.
        cache: the cache that the model will be called with.
        states: layer index to `[B, H, R, R]` for each layer with a memory, as returned by `get_memory`.

    Raises:
        TypeError, ValueError: the states do not fit the model's memory, or cache is not a cache. It is then unchanged.
    """
    check_states(model, states)
    memory = cache_memory(cache)
    memory.clear()
    memory.update({index: LayerMemory(state) for index, state in states.items()})
