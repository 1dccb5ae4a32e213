"""What the attention modules of one model call share, and how it reaches them.

The stack of layers creates a `StackContext` and makes it current while it runs. An attention module in the stack finds
it there. If gradients are recorded, each layer is also called with the context as a keyword argument: checkpointing
stores a layer's arguments and calls it again in backward, when the stack does not run. The layer removes the keyword
and makes the context current again, so that it does not depend on a layer to pass keywords on, which not all layers do.

A context that is missing is noticed. Attention that runs in backward without one raises if the model was ever called
with a `MemoryCall` or with packed rows, since the recomputed result would then be wrong.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .masks import token_mask

if TYPE_CHECKING:
    from .call import MemoryCall
    from .layer_call import LayerCall
    from .step_call import StepCall

KEYWORD = "delta_memory_context"


class StackContext:
    """The context of one call of a stack of layers.

    Attributes:
        call: the MemoryCall that applies, or None.
        starts: `[B or 1, T]` bool, True where a packed sequence begins. None if each row is one sequence.
        steps: whether calls with one token are decoding steps, in one native call.
    """

    def __init__(self, call: MemoryCall | None = None, starts: Tensor | None = None) -> None:
        self.call = call
        self.starts = starts
        self.steps = call is None and starts is None and not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        self._masks: dict[tuple, tuple[object, Tensor | None]] = {}

    def token_mask(self, attention_mask: object, batch: int, tokens: int, past: int | Tensor) -> Tensor | None:
        """Like `masks.token_mask`, but computed once for all layers. On a CPU also None if there is no padding."""
        if attention_mask is None:
            return None
        if torch.compiler.is_compiling() or not isinstance(past, int):
            return token_mask(attention_mask, batch, tokens, past)
        key = (id(attention_mask), batch, tokens, past)
        if key not in self._masks:
            mask = token_mask(attention_mask, batch, tokens, past)
            if mask is not None and mask.device.type == "cpu" and mask.all():
                mask = None
            self._masks[key] = attention_mask, mask  # the attention mask is kept, so that its id stays its own
        return self._masks[key][1]


class _Running(threading.local):
    """What runs in a thread: the innermost stack or layer's context, and the innermost call of an attention module."""

    context: StackContext | None = None
    layer_call: LayerCall | StepCall | None = None


running = _Running()


class Attachment:
    """What the modules of one attached memory share: which contexts the model was called in."""

    def __init__(self) -> None:
        self.had_context = False  # whether there ever was a MemoryCall or a packed row
        self.had_call = False
        self._calls_of: dict[StorageWeakRef, set[int]] = {}

    def __reduce__(self) -> tuple:
        return Attachment, ()

    def context_of_attention(self) -> StackContext:
        """Return the context of an attention module that is called now.

        Raises:
            RuntimeError: the call is a recomputation in backward that has lost its context.
        """
        context = running.context
        if context is not None:
            return context
        if self.had_context and in_backward():
            raise RuntimeError(
                "an attention module with a memory is recomputed in backward without its layer, so that its MemoryCall "
                "and packed sequences are unknown: checkpoint the layers instead, with gradient_checkpointing_enable"
            )
        return NO_CONTEXT

    def context_of_stack(self, call: MemoryCall | None, starts: Tensor | None, given: tuple) -> StackContext:
        """Return the context of a stack that is called now.

        Args:
            call: the open MemoryCall of the stack, or None.
            starts: where packed sequences begin.
            given: the arguments that the stack is called with. A recomputation is recognised by the first tensor among
                them: checkpointing keeps it, so no other tensor has its storage until then.

        Raises:
            RuntimeError: the call is a recomputation in backward, and its forward was not in this MemoryCall.
        """
        if call is not None or starts is not None:
            self.had_context, self.had_call = True, self.had_call or call is not None
        if self.had_call and not torch.compiler.is_compiling():
            number = 0 if call is None else call.number
            inputs = next((x for x in given if isinstance(x, Tensor)), torch.empty(0))
            storage = StorageWeakRef(inputs.untyped_storage())
            if not in_backward():
                if len(self._calls_of) >= 64:
                    self._calls_of = {ref: calls for ref, calls in list(self._calls_of.items()) if not ref.expired()}
                self._calls_of.setdefault(storage, set()).add(number)
            elif self._calls_of.get(storage) != {number}:
                raise RuntimeError(
                    "a model with a memory is recomputed in backward outside of its MemoryCall, or its input tensor "
                    "was used in several calls, so that this is not known: call backward inside the `with` block and "
                    "pass each call a tensor of its own (input_ids.clone()), or checkpoint the layers instead of the "
                    "model, with gradient_checkpointing_enable"
                )
        return StackContext(call, starts)


NO_CONTEXT = StackContext()
NO_CONTEXT.steps = False  # the context of a call outside of a stack is not known


def in_backward() -> bool:
    """Return whether autograd runs a backward pass in this thread, as it does when checkpointed code is recomputed."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1  # noqa: SLF001
