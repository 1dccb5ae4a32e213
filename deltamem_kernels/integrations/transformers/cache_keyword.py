"""The keyword under which models of transformers take a cache: `cache` since 5.24, `past_key_values` before."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

CACHE_KEYWORDS = ("cache", "past_key_values")


def cache_keyword(module: nn.Module) -> str | None:
    """Return the keyword under which a model or an attention module takes a cache; None if it takes no cache."""
    parameters = inspect.signature(module.forward).parameters
    return next((keyword for keyword in CACHE_KEYWORDS if keyword in parameters), None)


def given_cache(kwargs: dict[str, Any]) -> Any:
    """Return the cache among a call's keyword arguments, or None.

    Both keywords are looked up, whichever the module's own is. Releases with `cache` still accept `past_key_values`,
    and releases with `past_key_values` pass a paged cache as `cache`.
    """
    cache = kwargs.get("cache")
    return kwargs.get("past_key_values") if cache is None else cache
