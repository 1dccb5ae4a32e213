"""The modules of a model with a memory: what each of them does besides what it did before."""

from __future__ import annotations

import inspect
import warnings
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ...nn.memory import is_plain
from .call import active_call
from .context import KEYWORD, Attachment, running
from .extending import Extension, check_own_forward, extend, restore
from .layer_call import LayerCall
from .packing import sequence_starts
from .step_call import StepCall

PAGED = (
    "generate_batch and continuous batching do not support a memory: a paged cache cannot hold its states. Use generate"
)


class Model(Extension):
    """A model of transformers. Methods that would lose the memory or its states raise or warn."""

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(PAGED)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(PAGED)

    def continuous_batching_context_manager(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(PAGED)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        warnings.warn(
            "deltamem_kernels: save_pretrained writes the memory's weights among those of the model, and "
            "from_pretrained does not load them: save the memory with save_adapter(model, folder), and the model after "
            "detach_memory(model)",
            stacklevel=2,
        )
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]


class Stack(Extension):
    """The stack of layers. It creates the context of a call."""

    memory_attachment: Attachment
    memory_lists: tuple[str, ...]
    """Names of the lists of layers."""
    memory_attentions: tuple[nn.Module, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        attachment = self.memory_attachment
        if not torch.compiler.is_compiling():
            for attention in self.memory_attentions:
                if "forward" in attention.__dict__:
                    check_own_forward(attention)
        starts = sequence_starts(self, args, kwargs)
        context = attachment.context_of_stack(active_call(attachment), starts, (*args, *kwargs.values()))
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            for name in self.memory_lists:  # layers may have been wrapped since
                carry_context(self.get_submodule(name))
        outer, running.context = running.context, context
        try:
            return super().forward(*args, **kwargs)
        finally:
            running.context = outer


class Carrier(Extension):
    """An entry of a list of layers: a layer, or what wraps it. It is called with the context, for checkpointing."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and running.context is not None and KEYWORD not in kwargs:
            kwargs[KEYWORD] = running.context
        return super().__call__(*args, **kwargs)


class Layer(Carrier):
    """A layer. It makes the context that it is called with current."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        context = kwargs.pop(KEYWORD, None)
        if context is None:
            return super().forward(*args, **kwargs)
        outer, running.context = running.context, context
        try:
            return super().forward(*args, **kwargs)
        finally:
            running.context = outer


class Attention(Extension):
    """An attention module. Before its own forward it reads and writes the memory, its submodule `delta_memory`."""

    memory_attachment: Attachment
    corrected_projections: dict[str, nn.Module]
    """The projections that are extended, by their names."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        modules: Any = self._modules  # attributes of a module that are modules take half a microsecond longer
        for name, projection in self.corrected_projections.items():
            if modules[name] is not projection:
                extend_projections(self, list(self.corrected_projections))
                break
        context = running.context
        if context is None:
            context = self.memory_attachment.context_of_attention()
        x: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        given = kwargs
        if len(args) > 1:
            given = inspect.signature(self.forward).bind_partial(*args).arguments | kwargs
        memory = modules["delta_memory"]
        is_step = context.steps and x.shape[1] == 1 and is_plain(memory)
        is_step = is_step and memory.config.memory_write_granularity == "token"
        call = (StepCall if is_step else LayerCall)(self, context, x, given)
        outer, running.layer_call = running.layer_call, call
        try:
            output = super().forward(*args, **kwargs)
        finally:
            running.layer_call = outer
        call.finish()
        return output


class Projection(Extension):
    """A projection that the memory corrects."""

    memory_name: str
    """The name of the projection, such as `q_proj`."""
    memory_index: int
    """Its place among the corrected projections."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        call = running.layer_call
        if call is None or call.attention.corrected_projections.get(self.memory_name) is not self:
            return output
        return call.correct(self, output, not torch.is_grad_enabled() and not (args and output is args[0]))


def carry_context(layers: nn.Module) -> None:
    """Extend the entries of a list of layers, unless they are extended."""
    for layer in layers.children():
        if not isinstance(layer, Carrier) and any(isinstance(module, Layer) for module in layer.modules()):
            extend(layer, Carrier)


def extend_projections(attention: Any, names: list[str]) -> None:
    """Extend the projections of these names, which PEFT may have replaced since they were extended."""
    for index, name in enumerate(names):
        projection = attention._modules[name]
        if not isinstance(projection, Projection):  # a copy of an extended one, as in DataParallel, is extended
            restore_projection(attention.corrected_projections.get(name))
            extend(projection, Projection)
        object.__setattr__(projection, "memory_name", name)
        object.__setattr__(projection, "memory_index", index)
    attention.corrected_projections = {name: attention._modules[name] for name in names}


def restore_projection(projection: nn.Module | None) -> None:
    """Restore a projection if it is extended."""
    if isinstance(projection, Projection):
        restore(projection)
        object.__delattr__(projection, "memory_name")
        object.__delattr__(projection, "memory_index")
