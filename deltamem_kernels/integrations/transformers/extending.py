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
    if _own_forward(mixins):
        check_own_forward(module)
    original: Any = type(module)
    _set_class(module, extended_class(mixins, original))


def check_own_forward(module: nn.Module) -> None:
    """Raise ValueError if the forward of this module alone was replaced. Hooks of accelerate call it, and are fine."""
    if "forward" in module.__dict__ and "_old_forward" not in module.__dict__:
        raise ValueError(
            f"the forward of a {type(module).__name__} was replaced by another library, so that a memory would not run "
            "in it"
        )


def check_restorable(module: nn.Module) -> None:
    """Raise RuntimeError if another library has extended the module after `extend`."""
    if "original_class" not in type(module).__dict__:
        raise RuntimeError(
            f"the class of a {type(module).__name__} was changed after attach_memory, for example by fully_shard or a "
            "parametrization: undo that first, then call detach_memory"
        )


def restore(module: nn.Module) -> None:
    """Undo `extend`."""
    check_restorable(module)
    cls: Any = type(module)
    _set_class(module, cls.original_class)


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
