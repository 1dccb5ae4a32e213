"""Extend single modules: their class is replaced by a subclass, made on demand from a mixin and the module's own class.

The module stays the same object, with its name, parameters and hooks. A call costs as much as an overridden method.
FSDP2 and `torch.nn.utils.parametrize` extend modules in the same way. docs/architecture.md compares it with hooks.
"""

from __future__ import annotations

import functools
import types
from typing import Any, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


class Extension(nn.Module):
    """Base of the mixins."""

    original_class: type
    mixins: tuple[type, ...]

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """Pickle and copy the module as one of its original class, which pickle can find by name."""
        reduced: Any = super().__reduce_ex__(protocol)
        build, args, *rest = reduced
        cls: Any = type(self)
        build, *args = (cls.original_class if x is cls else x for x in (build, *args))
        return _rebuild, (cls.mixins, build, tuple(args)), *rest


def extend(module: nn.Module, *mixins: type[Extension]) -> None:
    """Extend a module by mixins.

    Raises:
        ValueError: the forward of this module alone was replaced, so that an overridden one would not run.
    """
    hooked_by_accelerate = "_old_forward" in module.__dict__
    if "forward" in module.__dict__ and not hooked_by_accelerate and _own_forward(mixins):
        raise ValueError(
            f"the model does not fit: another library replaced the forward of a {type(module).__name__}. Attach the "
            "memory first"
        )
    original: Any = type(module)
    _set_class(module, extended_class(mixins, original))


def restore(module: nn.Module) -> None:
    """Undo `extend`.

    Raises:
        RuntimeError: another library has extended the module since.
    """
    cls = type(module)
    if "original_class" not in cls.__dict__:
        raise RuntimeError(f"detach_memory must come before what extended {cls.__name__} after attach_memory is undone")
    _set_class(module, cls.original_class)  # type: ignore[attr-defined]


@functools.cache
def extended_class(mixins: tuple[type[Extension], ...], original: Any) -> type:
    """Return the subclass of a module's class with the mixins. It has the same name, which accelerate looks for."""
    names: dict[str, Any] = {"original_class": original, "mixins": mixins, "__module__": original.__module__}
    names |= {"__qualname__": original.__qualname__, "__doc__": original.__doc__}
    function = _own_forward(mixins)
    if function is not None:  # a copy with the original's signature, which transformers and PEFT inspect
        copy = types.FunctionType(function.__code__, function.__globals__, "forward", None, function.__closure__)
        copy.__kwdefaults__ = function.__kwdefaults__
        names["forward"] = functools.update_wrapper(copy, original.forward)  # type: ignore[attr-defined]
    return type(original.__name__, (*mixins, original), names)


def _own_forward(mixins: tuple[type[Extension], ...]) -> Any:
    return next((mixin.forward for mixin in mixins if mixin.forward is not Extension.forward), None)


def _set_class(module: nn.Module, cls: Any) -> None:
    object.__setattr__(module, "__class__", cls)  # a compiled module would pass an attribute on to the original
    if "_old_forward" in module.__dict__:  # accelerate's hooks call it, and restore it when they are removed
        module.__dict__["_old_forward"] = types.MethodType(cls.forward, module)


def _rebuild(mixins: tuple[type[Extension], ...], build: Any, args: tuple) -> nn.Module:
    module = build(*args)
    extend(module, *mixins)
    return module
