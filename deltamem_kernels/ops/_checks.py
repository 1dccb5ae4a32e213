"""Checks of arguments, shared by the operations: shape, dtype, device and mode, never a value on a GPU.

Each message names the argument, what came and what is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from ..backends import extension

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDICES = (torch.int32, torch.int64)
MODES = ("standard", "lambda_outside", "no_lambda")
MAX_RANK = 128


_MOST_CALLS = 512


def check_once(checked: set[bytes], check: Callable[..., None], *operands: object) -> None:
    """check(*operands), unless a call that looks the same is among those checked, as a layer's do token after token.
    To look takes 1 µs and little code: that of the checks would be cold in every layer of a decoding step."""
    call = None if torch.compiler.is_compiling() else extension.fingerprint(operands)
    if call not in checked:
        check(*operands)
        if call is not None:
            if len(checked) >= _MOST_CALLS:
                checked.clear()
            checked.add(call)


def describe(x: object) -> str:
    if not isinstance(x, Tensor):
        return f"{type(x).__name__} {x!r:.60}"
    layout = "" if x.layout is torch.strided else f"{str(x.layout).removeprefix('torch.')} "
    return f"{layout}{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"


def fail(error: type[Exception], name: str, wanted: str, got: object) -> NoReturn:
    raise error(f"{name} must be {wanted}, got {describe(got)}")


def fits(x: object, shape: tuple[int, ...], device: torch.device) -> bool:
    """Whether x needs no second look, which makes the messages: a dense float tensor of this shape on this device."""
    return (
        isinstance(x, Tensor)
        and x.dtype in FLOATS
        and x.shape == shape
        and x.device == device
        and x.layout is torch.strided
    )


def check_fits(name: str, x, shapes: Sequence[tuple[int, ...]], wanted: str, device: torch.device, of: str) -> None:
    """x is a dense tensor of a floating dtype, one of the shapes, on the device of `of`."""
    if not fits(x, shapes[0], device):
        check_float(name, x, wanted)
        check_shape(name, x, shapes, wanted)
        check_device(name, x, device, of)


def check_float(name: str, x: object, wanted: str) -> None:
    """x is a tensor of one of the four floating dtypes."""
    if not isinstance(x, Tensor):
        fail(TypeError, name, f"a tensor {wanted}", x)
    if x.dtype not in FLOATS:
        fail(TypeError, name, f"float16, bfloat16, float32 or float64 {wanted}", x)
    if x.layout is not torch.strided:
        fail(TypeError, name, f"a dense tensor {wanted}", x)


def check_shape(name: str, x: Tensor, shapes: Sequence[tuple[int, ...]], wanted: str) -> None:
    """x has one of the shapes."""
    for shape in shapes:
        if x.shape == shape:
            return
    fail(ValueError, name, f"{wanted} = {' or '.join(str(list(s)) for s in shapes)}", x)


def check_device(name: str, x: Tensor, device: torch.device, of: str = "q") -> None:
    if x.device != device:
        fail(ValueError, name, f"on {of}'s device {device}", x)


def check_indices(name: str, x: object, shapes: Sequence[tuple[int, ...]], wanted: str, device, of: str = "q") -> None:
    """x is a dense tensor of whole numbers, one of the shapes, on the device of `of`. The values are the kernels'
    affair."""
    if not isinstance(x, Tensor) or x.dtype not in INDICES:
        fail(TypeError, name, f"an int32 or int64 tensor {wanted}", x)
    if x.layout is not torch.strided:
        fail(TypeError, name, f"a dense tensor {wanted}", x)
    check_shape(name, x, shapes, wanted)
    check_device(name, x, device, of)


def check_int(name: str, x: object) -> None:
    if not isinstance(x, (int, torch.SymInt)) or isinstance(x, bool):
        fail(TypeError, name, "an int", x)


def check_bool(name: str, x: object) -> None:
    if not isinstance(x, bool):
        fail(TypeError, name, "True or False", x)


def check_mode(mode: object) -> None:
    if not isinstance(mode, str):
        fail(TypeError, "mode", f"one of {', '.join(MODES)}", mode)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")


def check_backend(backend: object) -> None:
    """A name or nothing; which names there are is the backends' affair."""
    if not isinstance(backend, str):
        fail(TypeError, "backend", "the name of a backend, or None", backend)


def check_cu_seqlens(cu_seqlens: object, batch: int, device: torch.device, of: str = "q") -> None:
    """`[N + 1]` int32 or int64 on the device of q, and one row of packed tokens. The values are the kernels' affair."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in INDICES:
        fail(TypeError, "cu_seqlens", "an int32 or int64 tensor [N + 1]", cu_seqlens)
    if cu_seqlens.layout is not torch.strided:
        fail(TypeError, "cu_seqlens", "a dense tensor [N + 1]", cu_seqlens)
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        fail(ValueError, "cu_seqlens", "[N + 1], the N sequences' starts and the end", cu_seqlens)
    if batch != 1:
        raise ValueError(f"cu_seqlens needs packed sequences, B = 1, got {of} with B = {batch}")
    check_device("cu_seqlens", cu_seqlens, device, of)


def check_mask(mask: object, shape: tuple[int, int], device: torch.device, of: str = "q") -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        fail(TypeError, "mask", "a bool tensor [B, T], True where a token counts", mask)
    if mask.layout is not torch.strided:
        fail(TypeError, "mask", "a dense tensor [B, T]", mask)
    check_shape("mask", mask, (shape,), "[B, T]")
    check_device("mask", mask, device, of)
