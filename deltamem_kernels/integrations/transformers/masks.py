"""Derive which tokens are padding from the mask that an attention module receives."""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask


def token_mask(attention_mask: object, batch: int, tokens: int, past: int | Tensor) -> Tensor | None:
    """Return a mask `[B, T]` bool, False for padding, or None if there is no attention mask.

    A token is padding if it may not attend to itself. In a mask over queries and keys this is the entry of token i for
    its own key, `past + i`, or one of the last T keys if a sliding window has dropped the oldest keys.

    Args:
        attention_mask: None; `[B, keys]`, zero for padding; `[B or 1, heads, T, keys]`, bool (True attends) or floating
            (added to the scores); or a BlockMask of flex attention.
        batch: B.
        tokens: T.
        past: number of tokens in the cache before the call.

    Raises:
        TypeError: the mask is of another kind.
        ValueError: the mask's shape does not fit.
    """
    if attention_mask is None:
        return None
    if isinstance(attention_mask, BlockMask):
        keys = attention_mask.seq_lengths[1]
        device = attention_mask.kv_num_blocks.device
        own = own_key_indices(tokens, keys, past, device)
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
            f"attention_mask must have shape [B, keys] or [B or 1, heads, T, keys] with B={batch}, T={tokens} and at "
            f"least T keys, got {shape}"
        )
    own = own_key_indices(tokens, shape[3], past, attention_mask.device)
    diagonal = attention_mask[:, 0].gather(2, own[None, :, None].expand(shape[0], tokens, 1)).squeeze(2)
    if diagonal.dtype != torch.bool:
        if not diagonal.is_floating_point():
            raise TypeError(f"a 4-D attention_mask must be bool or floating, got {diagonal.dtype}")
        diagonal = diagonal > torch.finfo(diagonal.dtype).min / 2
    return diagonal.expand(batch, tokens)


class _MaskCache(threading.local):
    """The latest token mask, with what it was computed from."""

    attention_mask: weakref.ref | None = None
    key: tuple | None = None
    token_mask: Tensor | None = None


_cache = _MaskCache()


def cached_token_mask(attention_mask: object, batch: int, tokens: int, past: int | Tensor) -> Tensor | None:
    """Like `token_mask`, but computed once for all layers of a call. On a CPU also None if there is no padding.

    The mask is not cached if `past` is a tensor. It is recomputed in every call of the model (`clear_mask_cache`).
    """
    cacheable = isinstance(attention_mask, Tensor) and not attention_mask.is_inference() and isinstance(past, int)
    if not cacheable or torch.compiler.is_compiling():
        return token_mask(attention_mask, batch, tokens, past)
    key = (attention_mask._version, batch, tokens, past)  # type: ignore[attr-defined]
    if _cache.attention_mask is None or _cache.attention_mask() is not attention_mask or _cache.key != key:
        mask = token_mask(attention_mask, batch, tokens, past)
        if mask is not None and mask.device.type == "cpu" and mask.all():
            mask = None
        _cache.attention_mask, _cache.key, _cache.token_mask = weakref.ref(attention_mask), key, mask  # type: ignore[type-var]
    return _cache.token_mask


def clear_mask_cache() -> None:
    """Discard the cached mask. The attention mask may have changed without an increase of its version counter."""
    _cache.attention_mask = None


def own_key_indices(tokens: int, keys: int, past: int | Tensor, device: torch.device) -> Tensor:
    """Return the index of each token's own key among the keys that a layer attends to, `[T]`."""
    query = torch.arange(tokens, device=device)
    return torch.minimum(query + past, query + (keys - tokens))
