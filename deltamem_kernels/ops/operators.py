"""The namespace `torch.ops.deltamem_kernels`: how an operation defines its operators, and schemas made from records.

The operators are registered from Python, so that they exist without a compiled library. Autograd is not registered with
them: an operation wraps its operator in an autograd.Function, and a call without gradients skips autograd.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..backends import choose
from ..operands.types import Symbolic, Written

library = torch.library.Library("deltamem_kernels", "DEF")

_TYPES = {
    Tensor: "Tensor",
    Sequence[Tensor]: "Tensor[]",
    bool: "bool",
    int: "int",
    float: "float",
    str: "str",
    Symbolic: "SymInt",
    torch.dtype: "ScalarType",
}
_NAMES = {"mode": "update_mode"}  # torch.compile calls operators that mutate with a keyword `mode` of its own


def arguments(record: type) -> str:
    """Return the fields of an operand record as the arguments of an operator's schema."""
    hints = typing.get_type_hints(record, include_extras=True)
    aliases = iter("abcdef")
    return ", ".join(f"{_type(hint, aliases)} {_NAMES.get(name, name)}" for name, hint in hints.items())


def _type(hint: object, aliases: typing.Iterator[str]) -> str:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    optional = "?" if type(None) in options else ""
    (wanted,) = (x for x in options if x is not type(None))
    return (f"Tensor({next(aliases)}!)" if wanted == Written else _TYPES[wanted]) + optional  # type: ignore[index]


def define(name: str, schema: str, implementation: Callable, fake: Callable) -> None:
    """Define an operator: one boundary for the dispatcher, autograd and torch.compile.

    Args:
        name: of the operator.
        schema: its arguments and results, `"(...) -> ..."`.
        implementation: runs it, for every device.
        fake: returns results of the right shape, dtype and device without computing them.
    """
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"deltamem_kernels::{name}", fake, lib=library)


def check_fake(backend: str, like: Tensor) -> None:
    """Raise for tensors on the meta device if the backend could not run on that device. No kernel will run."""
    if like.device.type == "meta":
        choose(backend, like.device)


def mark_written(*tensors: Tensor) -> None:
    """Tell autograd that a kernel wrote into these tensors."""
    torch.autograd.graph.increment_version(tensors)


def present(gradients: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the gradients that were computed: an operator's list holds no None."""
    return [g for g in gradients if g is not None]


def where_needed(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """Put the gradients of an operator's list back where they are needed, and None elsewhere."""
    rest = iter(gradients)
    return [next(rest) if need else None for need in needs]


def empty_like_needed(operands: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    """Return an empty contiguous tensor like each operand whose gradient is needed, for fakes."""
    return [x.new_empty(x.shape) for x, need in zip(operands, needs, strict=True) if need and x is not None]
