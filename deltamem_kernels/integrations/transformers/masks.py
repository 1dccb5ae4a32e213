"""Derive which tokens are padding from the mask that an attention module receives."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

MASKED = -1000.0


def token_mask(attention_mask: object, batch: int, tokens: int, past: int | Tensor) -> Tensor | None:
    """Return a mask `[B, T]` bool, False for padding, or None if there is no attention mask.

    A token is padding if it may not attend to itself: False in a boolean mask, a score of -1000 or less in an additive
    one (-inf, the dtype's minimum, -1e9, -65504 and -1e4 are in use, and exp(-1000) is 0). In a mask over queries and
    keys this is the entry of token i for its own key, `past + i`, or one of the last T keys if a sliding window has
    dropped the oldest keys.

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
        diagonal = diagonal > MASKED
    return diagonal.expand(batch, tokens)


def own_key_indices(tokens: int, keys: int, past: int | Tensor, device: torch.device) -> Tensor:
    """Return the index of each token's own key among the keys that a layer attends to, `[T]`."""
    query = torch.arange(tokens, device=device)
    return torch.minimum(query + past, query + (keys - tokens))
