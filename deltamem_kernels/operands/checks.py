"""Checks of arguments, shared by the operand records: type, dtype, layout, shape and device, never a value on a GPU.

Each message names the argument, what is wanted and what came.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDICES = (torch.int32, torch.int64)
MODES = ("standard", "lambda_outside", "no_lambda")
MAX_RANK = 128

Shape = tuple[int, ...]


def describe(x: object) -> str:
    """Describe an argument for an error message: dtype, shape and device of a tensor, type and value of the rest."""
    if not isinstance(x, Tensor):
        return f"{type(x).__name__} {x!r:.60}"
    layout = "" if x.layout is torch.strided else f"{str(x.layout).removeprefix('torch.')} "
    return f"{layout}{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"


def fail(error: type[Exception], name: str, wanted: str, got: object) -> NoReturn:
    """Raise `error`: the argument `name` must be `wanted`."""
    raise error(f"{name} must be {wanted}, got {describe(got)}")


def is_dense_float(x: object, shape: Shape, device: torch.device) -> bool:
    """Return True if x is a dense floating-point tensor of this shape on this device."""
    return (
        isinstance(x, Tensor)
        and x.dtype in FLOATS
        and x.shape == shape
        and x.device == device
        and x.layout is torch.strided
    )


def check_tensor(name: str, x, shapes: Sequence[Shape], wanted: str, like: tuple[str, Tensor]) -> None:
    """Check that x is a dense floating-point tensor, has one of the shapes, and is on the device of the operand `like`,
    which is given by name and value."""
    of, other = like
    if not is_dense_float(x, shapes[0], other.device):
        check_float(name, x, wanted)
        check_shape(name, x, shapes, wanted)
        check_device(name, x, other.device, of)


def check_float(name: str, x: object, wanted: str) -> None:
    """Check that x is a dense tensor of one of the four floating-point dtypes."""
    if not isinstance(x, Tensor):
        fail(TypeError, name, f"a tensor {wanted}", x)
    if x.dtype not in FLOATS:
        fail(TypeError, name, f"float16, bfloat16, float32 or float64 {wanted}", x)
    if x.layout is not torch.strided:
        fail(TypeError, name, f"a dense tensor {wanted}", x)


def check_shape(name: str, x: Tensor, shapes: Sequence[Shape], wanted: str) -> None:
    """Check that x has one of the shapes."""
    for shape in shapes:  # a loop costs a third of any() with a generator
        if x.shape == shape:
            return
    fail(ValueError, name, f"{wanted} = {' or '.join(str(list(shape)) for shape in shapes)}", x)


def check_device(name: str, x: Tensor, device: torch.device, of: str) -> None:
    """Check that x is on the device of the operand called `of`."""
    if x.device != device:
        fail(ValueError, name, f"on {of}'s device {device}", x)


def check_rank(name: str, x: Tensor) -> None:
    """Check the state's rank R, the size of x's last dimension."""
    if not 1 <= x.shape[-1] <= MAX_RANK:
        fail(ValueError, name, f"of rank R from 1 to {MAX_RANK} in its last dimension", x)


def check_indices(name: str, x: object, shapes: Sequence[Shape], wanted: str, like: tuple[str, Tensor]) -> None:
    """Check that x is a dense int32 or int64 tensor, has one of the shapes, and is on the device of the operand `like`.
    Values are not checked here."""
    of, other = like
    if not isinstance(x, Tensor) or x.dtype not in INDICES:
        fail(TypeError, name, f"an int32 or int64 tensor {wanted}", x)
    if x.layout is not torch.strided:
        fail(TypeError, name, f"a dense tensor {wanted}", x)
    check_shape(name, x, shapes, wanted)
    check_device(name, x, other.device, of)


def check_int(name: str, x: object, wanted: str = "an int") -> None:
    if not isinstance(x, (int, torch.SymInt)) or isinstance(x, bool):
        fail(TypeError, name, wanted, x)


def check_bool(name: str, x: object) -> None:
    if not isinstance(x, bool):
        fail(TypeError, name, "True or False", x)


def check_number(name: str, x: object, wanted: str = "a number") -> None:
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        fail(TypeError, name, wanted, x)
    if isinstance(x, int) and abs(x) > sys.float_info.max:
        fail(ValueError, name, f"{wanted} in the range of a float", x)


def check_mode(mode: object, decay: object = None, decay_name: str = "decay") -> None:
    """Check the update mode, and that "no_lambda" comes without a decay."""
    if not isinstance(mode, str):
        fail(TypeError, "mode", f"one of {', '.join(MODES)}", mode)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if mode == "no_lambda" and decay is not None:
        fail(ValueError, decay_name, "None in mode 'no_lambda', which keeps everything (λ = 1)", decay)


def check_backend(backend: object) -> None:
    """Check that backend is a string or None. The registry of backends validates the name."""
    if backend is not None and not isinstance(backend, str):
        fail(TypeError, "backend", "the name of a backend, or None", backend)


def check_cu_seqlens(cu_seqlens: object, batch: int, like: tuple[str, Tensor]) -> None:
    """Check that cu_seqlens is `[N + 1]` int32 or int64, and that there is one row of packed tokens. Values are not
    checked here."""
    of, other = like
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in INDICES:
        fail(TypeError, "cu_seqlens", "an int32 or int64 tensor [N + 1]", cu_seqlens)
    if cu_seqlens.layout is not torch.strided:
        fail(TypeError, "cu_seqlens", "a dense tensor [N + 1]", cu_seqlens)
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        fail(ValueError, "cu_seqlens", "[N + 1], the starts of the N sequences and the end", cu_seqlens)
    if batch != 1:
        raise ValueError(f"cu_seqlens needs packed sequences, B = 1, got {of} with B = {batch}")
    check_device("cu_seqlens", cu_seqlens, other.device, of)


def check_mask(mask: object, tokens: Shape, like: tuple[str, Tensor]) -> None:
    """Check that mask is a dense bool tensor `[B, T]` on the device of the operand `like`."""
    of, other = like
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        fail(TypeError, "mask", "a bool tensor [B, T], True where a token counts", mask)
    if mask.layout is not torch.strided:
        fail(TypeError, "mask", "a dense tensor [B, T]", mask)
    check_shape("mask", mask, (tokens,), "[B, T]")
    check_device("mask", mask, other.device, of)


def requires_grad(operands: Sequence[object]) -> bool:
    """Return True if gradients are recorded and one of the operands requires one."""
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in operands)
