"""The states of a request, in the cache that holds its keys and values.

The releases' own slots for recurrent states are in layers of other types (linear attention), which a model's
configuration asks for and whose `crop` refuses where such a state is; so ours are beside the layers.

The cache that a model is given becomes a subclass of its own class, with the states of each layer in it: whoever
copies, reorders, selects, crops or resets the cache does so with the states.
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

ROLLBACK = 128  # tokens that can be taken back at any time; more while the call that wrote them is the latest


QUANTIZED = getattr(cache_utils, "BaseQuantizedLayer", cache_utils.QuantizedLayer)


class Step(NamedTuple):
    """A call of a layer, so that it can be undone, or done in part."""

    tokens: int
    before: Tensor | None
    writes: Writes | None
    wrote: bool

    def first(self, tokens: int) -> Step:
        """The call of its first tokens alone."""
        return self._replace(tokens=tokens, writes=self.writes and self.writes.first(tokens))

    def state(self) -> Tensor | None:
        """What it leaves."""
        return self.before if self.writes is None or self.tokens == 0 else self.writes.onto(self.before)


class LayerMemory:
    """The state of one layer, and the calls that can be undone."""

    def __init__(self, state: Tensor | None = None) -> None:
        self.state = state
        self.steps: deque[Step] = deque()
        self.held = 0
        """tokens of these calls"""

    def advance(self, state: Tensor, step: Step) -> None:
        self.state = state
        self.steps.append(step)
        self.held += step.tokens
        while self.held - self.steps[0].tokens >= ROLLBACK:
            self.held -= self.steps.popleft().tokens

    def check_crop(self, tokens: int) -> None:
        for step in reversed(self.steps):
            if tokens < step.tokens and step.wrote and step.writes is None and tokens > 0:
                raise ValueError(f"a call that wrote messages can be taken back only whole, {step.tokens} tokens")
            tokens -= step.tokens
            if tokens <= 0:
                return
        if tokens > 0:
            raise ValueError(
                f"the memory can take back {self.held} tokens here, not {self.held + tokens}: it keeps the writes of "
                f"the latest {ROLLBACK} tokens or of the latest call, and none from before a reordering of the batch"
            )

    def crop(self, tokens: int) -> None:
        self.held -= tokens
        while tokens > 0:
            step = self.steps.pop()
            rest = step.first(max(step.tokens - tokens, 0))
            tokens -= step.tokens - rest.tokens
            self.state = rest.state()
            if rest.tokens:
                self.steps.append(rest)

    def select(self, change: Callable[[Tensor], Tensor]) -> None:
        self.state = None if self.state is None else change(self.state)
        self.steps.clear()
        self.held = 0


class MemoryCache:
    """What the class of a cache is given."""

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
        """Takes tokens back, from the memory too: as many as the keys and values lose.

        Raises:
            ValueError: more than the memory can take back, or a quantised cache, whose keys and values transformers
                does not take back; they stay as they are.
        """
        if any(isinstance(layer, QUANTIZED) for layer in self.layers):  # type: ignore[attr-defined]
            raise ValueError("a quantised cache cannot take tokens back")
        held = self.get_seq_length()  # type: ignore[attr-defined]
        for layer in self.memory.values():
            layer.check_crop(min(-length, held) if length < 0 else held - length if length else 0)
        super().crop(length)  # type: ignore[misc]
        for layer in self.memory.values():
            layer.crop(held - self.get_seq_length())  # type: ignore[attr-defined]

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.memory.clear()

    def __reduce_ex__(self, protocol: object) -> tuple:
        return _again, (type(self).__bases__[1], self.__dict__)  # a class made here is in no module

    def _select(self, change: Callable[[Tensor], Tensor]) -> None:
        for layer in self.memory.values():
            layer.select(change)


@functools.cache
def _with_memory(cls: type) -> type:
    return type(f"{cls.__name__}WithMemory", (MemoryCache, cls), {"__module__": __name__})


def _again(cls: type, fields: dict) -> object:
    """A cache with a memory, from a pickle."""
    cache: Any = object.__new__(cls)
    cache.__dict__.update(fields)
    cache.__class__ = _with_memory(cls)
    return cache


def layers_of(cache: object) -> dict[int, LayerMemory]:
    """The memory in a cache, by the layers' index; the cache can hold one from now on.

    Raises:
        TypeError: it is no cache of a decoder.
        ValueError: it is the paged cache of `generate_batch`.
    """
    if isinstance(cache, MemoryCache):
        return cache.memory
    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
        from transformers.generation.continuous_batching import PagedAttentionCache  # imports its scheduler too

        if isinstance(cache, PagedAttentionCache):
            raise ValueError("the states of a memory have no place in a paged cache (generate_batch): use generate")
        raise TypeError(f"cache must be a Cache of transformers for one decoder, got {type(cache).__name__}")
    memory: dict[int, LayerMemory] = {}
    cache.__class__ = _with_memory(type(cache))  # type: ignore[arg-type]
    cache.memory = memory  # type: ignore[attr-defined]
    return memory


def layer_of(cache: object, index: int) -> LayerMemory:
    """The memory of one layer in a cache; it is there from now on."""
    memory = cache.memory if isinstance(cache, MemoryCache) else layers_of(cache)
    layer = memory.get(index)
    if layer is None:
        layer = memory[index] = LayerMemory()
    return layer


def get_memory(cache: Cache) -> dict[int, Tensor]:
    """The states in a cache: `[B, H, R, R]`, float32, for each layer's index. Empty before the first call.

    Raises:
        TypeError: it is no cache, but the output of a model for example.
    """
    if not isinstance(cache, Cache):
        raise TypeError(f"cache must be a Cache of transformers, got {type(cache).__name__}")
    memory = cache.memory if isinstance(cache, MemoryCache) else {}
    return {index: layer.state for index, layer in memory.items() if layer.state is not None}


def set_memory(model: nn.Module, cache: Cache, states: dict[int, Tensor]) -> None:
    """Gives a cache the states of a memory, in place of those it has. With a new cache: memory without context.

    Args:
        model: the model with the memory.
        cache: what the model will be called with.
        states: `[B, H, R, R]` for the index of each layer that has a memory, as `get_memory` gives them.

    Raises:
        TypeError, ValueError: states that are not of this model's memory; the cache stays as it is.
    """
    check_states(model, states)
    memory = layers_of(cache)
    memory.clear()
    memory.update({index: LayerMemory(state) for index, state in states.items()})
