"""Replacements for methods of the δ-mem authors' layers, made for `upstream.patch`. `self` is a layer of theirs."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..ops.segment_mean import segment_mean

Means = tuple[Tensor | None, Tensor | None, Tensor | None]
"""The means `[B, M, D]`, which of them to write `[B, M]`, and the message index of each `[B, M]` (-1 for none). If they
are None, every token writes."""


def build_message_write_means(self: Any, hidden_states: Tensor, token_mask: Tensor | None) -> Means:
    given = self._message_write_inputs(hidden_states, token_mask)
    if self.memory_write_granularity != "message_mean" or given is None:
        return None, None, None
    ids, means, written = _means(hidden_states, *given)
    return means, written, torch.where(written, torch.arange(means.shape[1], device=ids.device), -1)


def build_sentence_write_means(self: Any, hidden_states: Tensor, token_mask: Tensor | None) -> Means:
    given = self._sentence_write_inputs(hidden_states, token_mask)
    if self.memory_write_granularity != "sentence_mean" or given is None:
        return None, None, None
    message_ids, sentence_ids, active = given
    ids, means, written = _means(hidden_states, sentence_ids, active)
    last = ids.shape[1] - 1
    tokens = torch.arange(last + 1, device=ids.device)
    first = ids.new_full(written.shape, last)  # the first token of each sentence
    first.scatter_reduce_(1, ids.clamp_min(0), torch.where(ids < 0, last, tokens), "amin")
    return means, written, torch.where(written, message_ids.to(ids.dtype).gather(1, first), -1)


def _means(hidden_states: Tensor, ids: Tensor, active: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ids, with -1 for inactive tokens, and the segment means.

    A GPU is synchronised once, for the number of segments; the authors' code synchronises several times per segment.
    """
    ids = torch.where(active, ids, -1).to(torch.int64)
    return ids, *segment_mean(hidden_states, ids, int(ids.max()) + 1)


# The attributes of a layer that its forward depends on. Checkpointing repeats a call when they have changed.
CONTEXT = ("delta_state", "write_enabled", "write_message_ids", "write_sentence_ids", "read_context_mask")

_calls: weakref.WeakKeyDictionary[nn.Module, WeakTensorKeyDictionary] = weakref.WeakKeyDictionary()
"""For each layer, the context of its calls, by their position embeddings: None if several calls share them."""


def trainable(forward: Callable) -> Callable:
    """Return the authors' `forward` for several steps of training, also under gradient checkpointing.

    A call that is repeated in backward starts from the context of the first one, and leaves no trace. After a backward
    that frees the graph, the layer keeps the value of its state, but not its history.
    """

    @functools.wraps(forward)
    def call(self: Any, hidden_states: Tensor, position_embeddings: Any, *args: Any, **kwargs: Any) -> Any:
        calls = _calls.setdefault(self, WeakTensorKeyDictionary())
        key = position_embeddings[0]  # each call of the model has its own; checkpointing passes the same tensor again
        if torch._C._current_graph_task_id() != -1:  # noqa: SLF001 - in backward
            if calls.get(key) is None:
                raise RuntimeError(
                    "patch() does not know which call of a layer is repeated in backward: calls of the model must not "
                    "share their position_embeddings, and the first call must come after patch()"
                )
            now = vars(self).copy()
            vars(self).update(calls[key])
            try:
                return forward(self, hidden_states, position_embeddings, *args, **kwargs)
            finally:
                vars(self).update(now)
        calls[key] = None if key in calls else {name: getattr(self, name) for name in CONTEXT}
        output = forward(self, hidden_states, position_embeddings, *args, **kwargs)
        for x in (output[0], self.delta_state):
            if x is not None and x.requires_grad:
                x.register_hook(functools.partial(_forget_history, weakref.ref(self), weakref.ref(self.delta_state)))
        return output

    return call


def _forget_history(layer: Callable[[], Any], state: Callable[[], Tensor | None], gradient: Tensor) -> None:
    """Hook of a gradient: detach the layer's state, if it is still this one and the backward frees its graph."""
    this, old = layer(), state()
    keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph()  # noqa: SLF001
    if this is not None and old is not None and this.delta_state is old and not keeps_graph:
        this.delta_state = old.detach()


# Replacements that keep the state in a wider dtype than the hidden states. Each is made from the function it replaces.


def ensure_state(theirs: Callable, state_dtype: torch.dtype) -> Callable:
    def _ensure_state(self: Any, batch_size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        dtype = torch.promote_types(dtype, state_dtype)
        if self.delta_state is not None:
            self.delta_state = self.delta_state.to(dtype)  # theirs resets a state of another dtype
        return theirs(self, batch_size, device, dtype)

    return _ensure_state


def token_state_reads(theirs: Callable, state_dtype: torch.dtype) -> Callable:
    def _token_state_reads(
        self: Any, state: Tensor, memory_q_seq: Tensor, read_route_seq: Tensor | None, token_mask: Tensor | None
    ) -> Tensor:
        reads = theirs(self, state, memory_q_seq.to(state.dtype), read_route_seq, token_mask)
        return reads.to(memory_q_seq.dtype)

    return _token_state_reads


def memory_affine_scan_torch(theirs: Callable, state_dtype: torch.dtype) -> Callable:
    def _memory_affine_scan_torch(
        self: Any,
        state: Tensor,
        memory_q_seq: Tensor,
        memory_k_seq: Tensor,
        memory_v_seq: Tensor,
        keep_seq: Tensor,
        erase_seq: Tensor,
        write_seq: Tensor,
        token_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        operands = (memory_q_seq, memory_k_seq, memory_v_seq, keep_seq, erase_seq, write_seq)
        state, reads = theirs(self, state, *(x.to(state.dtype) for x in operands), token_mask)
        return state, reads.to(memory_v_seq.dtype)

    return _memory_affine_scan_torch


def load_online_state(theirs: Callable, state_dtype: torch.dtype) -> Callable:
    def load_delta_mem_online_state(model: nn.Module, state: dict[str, Tensor]) -> None:
        theirs(model, state)
        layers = dict(model.named_modules())
        for name, tensor in state.items():
            rounded = layers[name].delta_state
            layers[name].delta_state = tensor.to(rounded.device, torch.promote_types(rounded.dtype, state_dtype))

    return load_delta_mem_online_state
