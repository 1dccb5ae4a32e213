"""Which tokens count, told from the mask that an attention module is given."""

from __future__ import annotations

import torch
from torch import Tensor


def token_mask(attention_mask: object, batch: int, tokens: int, past: int | Tensor) -> Tensor | None:
    """`[B, T]` bool, False for padding; None where every token counts.

    A token counts where it may attend to itself. Of a mask over queries and keys the token's own key is looked at: key
    `past + i` of token i, or, where a sliding window has dropped the oldest keys, the last T keys.

    Args:
        attention_mask: None; `[B, keys]`, not zero where a token counts; `[B or 1, heads, T, keys]`, bool (True:
            attends) or floating (added to the scores).
        past: how many tokens the cache held before.

    Raises:
        TypeError, ValueError: another kind of mask, or sizes that do not fit.
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor):
        raise TypeError(
            f"attention_mask must be a tensor or None for a model with a memory, got {type(attention_mask).__name__}: "
            "use attn_implementation 'sdpa', 'eager' or 'flash_attention_2'"
        )
    shape = list(attention_mask.shape)
    if attention_mask.ndim == 2 and shape[0] == batch and shape[1] >= tokens:
        return attention_mask[:, shape[1] - tokens :] != 0
    if attention_mask.ndim != 4 or shape[0] not in (1, batch) or shape[2] != tokens or shape[3] < tokens:
        raise ValueError(
            f"attention_mask must be [B, keys] or [B or 1, heads, T, keys] with B={batch}, T={tokens} and at least T "
            f"keys, got {shape}"
        )
    query = torch.arange(tokens, device=attention_mask.device)
    own = torch.minimum(query + past, query + (shape[3] - tokens))
    diagonal = attention_mask[:, 0].gather(2, own[None, :, None].expand(shape[0], tokens, 1)).squeeze(2)
    if diagonal.dtype != torch.bool:
        if not diagonal.is_floating_point():
            raise TypeError(f"attention_mask of four dimensions must be bool or floating, got {diagonal.dtype}")
        diagonal = diagonal > torch.finfo(diagonal.dtype).min / 2
    return diagonal.expand(batch, tokens)
