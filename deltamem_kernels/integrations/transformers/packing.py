"""Packed rows: several sequences in one row, as collators for training without padding create them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...operands.checks import INDICES, fail
from .cache_keyword import given_cache


def sequence_starts(stack: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """Find where the sequences of packed rows begin. Return `[B or 1, T]` bool, or None if each row is one sequence.

    Sequences are given by `cu_seq_lens_q`. Without it they are detected where `position_ids` do not increase by one,
    in calls without a mask `[B, keys]` and without a cache (`use_cache=False`): these are the calls in which
    transformers' masks separate packed sequences. Under a mask of the caller's own, of four dimensions or for flex
    attention, positions may have gaps; a sequence then begins where they do not increase. If a model's positions have
    three axes (Qwen2-VL), the text positions are used, the first of `[4, B, T]`. The result is computed on the tensors'
    device without synchronising a GPU.

    Args:
        stack: the module that owns the layers.
        args, kwargs: the arguments of its call.

    Raises:
        TypeError: cu_seq_lens_q is not a 1-D tensor of int32 or int64.
        ValueError: cu_seq_lens_q is given for more than one row.
    """
    if args:
        kwargs = inspect.signature(stack.forward).bind_partial(*args, **kwargs).arguments | kwargs
    limits, position_ids = kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")
    if limits is not None:
        return _starts_from_limits(limits, kwargs)
    mask = kwargs.get("attention_mask")
    if position_ids is not None and _has_three_axes(stack):
        position_ids = position_ids[0] if position_ids.ndim == 3 and len(position_ids) == 4 else None
    if position_ids is None or position_ids.ndim != 2 or given_cache(kwargs) is not None:
        return None
    use_cache = kwargs.get("use_cache")
    if getattr(stack.config, "use_cache", False) if use_cache is None else use_cache:
        return None
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return None
    growth = position_ids.diff(dim=1)
    starts = F.pad(growth != 1 if mask is None else growth < 1, (1, 0))
    if starts.device.type == "cpu" and not torch.compiler.is_compiling() and not starts.any():
        return None
    return starts


def _has_three_axes(stack: nn.Module) -> bool:
    """Whether the model's positions are those of time, height and width, as in Qwen2-VL."""
    rope = getattr(stack.config, "rope_parameters", None) or getattr(stack.config, "rope_scaling", None) or {}
    return "mrope_section" in rope


def _starts_from_limits(limits: Any, kwargs: dict[str, Any]) -> Tensor:
    given = next(kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None)
    if not isinstance(limits, Tensor) or limits.dtype not in INDICES or limits.ndim != 1:
        fail(TypeError, "cu_seq_lens_q", "int32 or int64 [N + 1]", limits)
    batch, tokens = given.shape[:2]
    if batch != 1:
        raise ValueError(f"cu_seq_lens_q needs a batch of one packed row, got {batch} rows")
    starts = torch.zeros(tokens + 1, dtype=torch.bool, device=given.device)  # empty sequences may start after the last
    return starts.index_fill_(0, limits[:-1].to(given.device, torch.int64), True)[None, :tokens]
