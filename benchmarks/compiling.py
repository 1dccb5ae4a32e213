"""torch.compile with the options that all benchmarks share."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

RECOMPILE_LIMIT = 64  # a graph for each model, number of tokens and set of inputs that require gradients


@functools.cache
def compiled(function: Callable) -> Callable:
    """Compile a function as one graph with static shapes. The compilation runs at the first call."""
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    return torch.compile(function, fullgraph=True, dynamic=False)
