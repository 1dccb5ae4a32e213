"""Which tokens count, told from the mask that an attention module is given."""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask


def token_mask(attention_mask: object, batch: int, tokens: int, past: int | Tensor) -> Tensor | None:
    """`[B, T]` bool, False for padding; None where every token counts.

    A token counts where it may attend to itself. Of a mask over queries and keys the token's own key is looked at: key
    `past + i` of token i, or, where a sliding window has dropped the oldest keys, the last T keys.

    Args:
        attention_mask: None; `[B, keys]`, not zero where a token counts; `[B or 1, heads, T, keys]`, bool (True:
            attends) or floating (added to the scores); flex attention's BlockMask.
        past: how many tokens the cache held before.

    Raises:
        TypeError, ValueError: another kind of mask, or sizes that do not fit.
    """
    if attention_mask is None:
        return None
    if isinstance(attention_mask, BlockMask):
        keys = attention_mask.seq_lengths[1]
        device = attention_mask.kv_num_blocks.device
        own = own_keys(tokens, keys, past, device)
        row, zero = torch.arange(batch, device=device)[:, None], torch.zeros((), dtype=torch.long, device=device)
        query = torch.arange(tokens, device=device)
        return attention_mask.mask_mod(row, zero, query[None], own[None]).expand(batch, tokens)
    if not isinstance(attention_mask, Tensor):
        raise TypeError(
            "attention_mask must be a tensor, a BlockMask or None for a model with a memory, got "
            f"{type(attention_mask).__name__}"
        )
    shape = list(attention_mask.shape)
    if attention_mask.ndim == 2 and shape[0] == batch and shape[1] >= tokens:
        return attention_mask[:, shape[1] - tokens :] != 0
    if attention_mask.ndim != 4 or shape[0] not in (1, batch) or shape[2] != tokens or shape[3] < tokens:
        raise ValueError(
            f"attention_mask must be [B, keys] or [B or 1, heads, T, keys] with B={batch}, T={tokens} and at least T "
            f"keys, got {shape}"
        )
    own = own_keys(tokens, shape[3], past, attention_mask.device)
    diagonal = attention_mask[:, 0].gather(2, own[None, :, None].expand(shape[0], tokens, 1)).squeeze(2)
    if diagonal.dtype != torch.bool:
        if not diagonal.is_floating_point():
            raise TypeError(f"attention_mask of four dimensions must be bool or floating, got {diagonal.dtype}")
        diagonal = diagonal > torch.finfo(diagonal.dtype).min / 2
    return diagonal.expand(batch, tokens)


class _Latest(threading.local):
    mask: weakref.ref | None = None
    sizes: tuple | None = None
    tokens: Tensor | None = None


_latest = _Latest()


def latest_mask(attention_mask: object, batch: int, tokens: int, past: int | Tensor) -> Tensor | None:
    """`token_mask`, computed once for the layers of a call, which have one mask; on a CPU None where all tokens count.

    A length that lies on a device is looked at again, and so is every mask in the next call (`new_call`).
    """
    known = isinstance(attention_mask, Tensor) and not attention_mask.is_inference() and isinstance(past, int)
    if not known or torch.compiler.is_compiling():
        return token_mask(attention_mask, batch, tokens, past)
    sizes = (attention_mask._version, batch, tokens, past)  # type: ignore[attr-defined]
    if _latest.mask is None or _latest.mask() is not attention_mask or _latest.sizes != sizes:
        mask = token_mask(attention_mask, batch, tokens, past)
        if mask is not None and mask.device.type == "cpu" and mask.all():
            mask = None
        _latest.mask, _latest.sizes, _latest.tokens = weakref.ref(attention_mask), sizes, mask  # type: ignore[type-var]
    return _latest.tokens


def new_call() -> None:
    """A mask may have changed where PyTorch does not see it."""
    _latest.mask = None


def own_keys(tokens: int, keys: int, past: int | Tensor, device: torch.device) -> Tensor:
    """`[T]`: where each token's own key is among those that a layer attends to."""
    query = torch.arange(tokens, device=device)
    return torch.minimum(query + past, query + (keys - tokens))
