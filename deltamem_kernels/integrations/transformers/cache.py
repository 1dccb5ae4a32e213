"""The states of a request, stored in the cache that holds its keys and values.

transformers has its own slots for recurrent states, but only in layers of other types (linear attention), which a
model's configuration selects and which cannot be cropped. The memory's states are therefore stored next to the layers.

The states are an attribute of the cache, so that copying and pickling a cache includes them. The methods of `Cache`
that reorder, select, crop or reset it are extended to do the same to the states. They are extended in the class, for
all caches, because `torch.compile` traces setting an attribute of a cache but not replacing its class.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import cache_utils
from transformers.cache_utils import Cache, EncoderDecoderCache

from ...nn.writes import Writes
from .states import check_states

ROLLBACK = 128  # tokens that can always be cropped; the latest call can be cropped even if it has more. Compiled calls
# record the latest call only.

QUANTIZED = getattr(cache_utils, "BaseQuantizedLayer", cache_utils.QuantizedLayer)


class Step(NamedTuple):
    """One call of a layer, recorded so that it can be undone fully or in part."""

    tokens: int
    before: Tensor | None
    """The state before the call. None means zeros."""
    writes: Writes | None
    """The writes of each token. None if tokens did not write, messages wrote their means, or the call had one token."""
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
        if torch.compiler.is_compiling():  # a record that grows would be compiled again for each token
            self.steps, self.recorded_tokens = deque([step]), step.tokens
            return
        self.steps.append(step)
        self.recorded_tokens += step.tokens
        if self.recorded_tokens > ROLLBACK:
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


def _with_memory(method: Callable, change: Callable) -> Callable:
    """Return a cache's method that applies `change` to the memory in the cache as well."""

    @functools.wraps(method)
    def with_memory(self: Any, *args: Any, **kwargs: Any) -> None:
        memory = self.__dict__.pop(NAME, None)  # a subclass may call the method of its base
        if memory is None:
            return method(self, *args, **kwargs)
        try:
            return change(self, memory, functools.partial(method, self), *args, **kwargs)
        finally:
            self.__dict__[NAME] = memory

    with_memory.applies_to_memory = True  # type: ignore[attr-defined]
    return with_memory


def _select(memory: dict[int, LayerMemory], change: Callable[[Tensor], Tensor]) -> None:
    for layer in memory.values():
        layer.select(change)


def _reorder_cache(cache: Any, memory: dict[int, LayerMemory], reorder: Callable, beam_idx: Tensor) -> None:
    reorder(beam_idx)
    _select(memory, lambda state: state.index_select(0, beam_idx.to(state.device)))


def _batch_select_indices(cache: Any, memory: dict[int, LayerMemory], select: Callable, indices: Tensor) -> None:
    select(indices)
    _select(memory, lambda state: state[indices])


def _batch_repeat_interleave(cache: Any, memory: dict[int, LayerMemory], repeat: Callable, repeats: int) -> None:
    repeat(repeats)
    _select(memory, lambda state: state.repeat_interleave(repeats, dim=0))


def _crop(cache: Any, memory: dict[int, LayerMemory], crop: Callable, length: int) -> None:
    """Crop keys and values as transformers does, and undo the same number of tokens in the memory.

    Raises:
        ValueError: the memory cannot undo so many tokens, or the cache is quantised, which transformers cannot crop.
            The cache is then unchanged.
    """
    if any(isinstance(layer, QUANTIZED) for layer in cache.layers):
        raise ValueError("a quantised cache cannot be cropped")
    cached = cache.get_seq_length()
    for layer in memory.values():
        layer.check_crop(min(-length, cached) if length < 0 else cached - length if length else 0)
    crop(length)
    for layer in memory.values():
        layer.crop(cached - cache.get_seq_length())


def _reset(cache: Any, memory: dict[int, LayerMemory], reset: Callable) -> None:
    reset()
    memory.clear()


NAME = "delta_memory"  # the attribute of a cache with its memory, layer index to LayerMemory
METHODS: dict[str, Callable] = {
    "reorder_cache": _reorder_cache,
    "batch_select_indices": _batch_select_indices,
    "batch_repeat_interleave": _batch_repeat_interleave,
    "crop": _crop,
    "reset": _reset,
}


def apply_to_memory(cls: type) -> None:
    """Make a cache class apply its changes to the memory in a cache as well. Caches without a memory do not change."""
    for name, change in METHODS.items():
        method = getattr(cls, name)
        if not hasattr(method, "applies_to_memory"):
            setattr(cls, name, _with_memory(method, change))


apply_to_memory(Cache)


def cache_memory(cache: object) -> dict[int, LayerMemory]:
    """Return the memory in a cache, by layer index. It is created if there is none.

    Raises:
        TypeError: the argument is not a cache of a decoder.
        ValueError: the argument is the paged cache of `generate_batch`.
    """
    memory = getattr(cache, NAME, None)
    if memory is not None:
        return memory
    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
        from transformers.generation.continuous_batching import PagedAttentionCache  # imports its scheduler too

        if isinstance(cache, PagedAttentionCache):
            raise ValueError("a paged cache (generate_batch) cannot hold the states of a memory: use generate")
        raise TypeError(f"cache must be a Cache of transformers for one decoder, got {type(cache).__name__}")
    apply_to_memory(type(cache))  # a subclass may have methods of its own
    memory = {}
    setattr(cache, NAME, memory)
    return memory


def layer_memory(cache: object, index: int) -> LayerMemory:
    """Return the memory of one layer in a cache. An empty one is created if there is none."""
    memory = cache_memory(cache)
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
    memory = getattr(cache, NAME, {})
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
