"""Initialise the value weights of a memory from the frozen model's hidden states.

Hidden states share a large common component. Random directions mostly read this component, and the part that separates
one word from another is only a few percent of what the memory returns, so gradient descent finds it late. The weights
of v therefore start as random combinations of the largest principal components, scaled to unit variance and orthogonal
to the mean.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from deltamem_kernels import segment_mean
from deltamem_kernels.integrations.transformers import memory_layers

from .passes import Batch, write, writes_messages

COMPONENTS = 128


@torch.no_grad()
def calibrate(model, batches: Iterable[Batch], seed: int = 0) -> None:
    """Set the value weights of a model's memory from the hidden states that it writes for these passages."""
    found: dict[int, list[Tensor]] = {}
    messages = writes_messages(model)

    def collect(attention: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        written = batch.passage_mask.bool()
        if messages:
            x, written = segment_mean(x, batch.message_ids, int(batch.message_ids.max()) + 1)
        found.setdefault(attention.layer_idx, []).append(x[written].float())

    layers = [attention for _, attention in memory_layers(model)]
    hooks = [attention.register_forward_pre_hook(collect, with_kwargs=True) for attention in layers]
    try:
        for batch in batches:  # the hooks read `batch`
            write(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    generator = torch.Generator().manual_seed(seed)
    for attention in layers:
        weight = attention.delta_memory.memory_v_proj
        weight.copy_(whitening(torch.cat(found[attention.layer_idx]), weight.shape[0], generator))


def whitening(x: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """Return random directions W `[rows, D]` such that W x has variance near 1 and mean 0 over the rows of `x [N, D]`.

    The directions are combinations of the largest `COMPONENTS` principal components of x.
    """
    x = x.double()
    mean = x.mean(0)
    variance, directions = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))  # ascending
    variance, directions = variance[-COMPONENTS:], directions[:, -COMPONENTS:]
    enough = variance > 1e-6 * variance[-1]
    variance, directions = variance[enough], directions[:, enough]
    random = torch.randn(rows, len(variance), generator=generator).to(x)
    weight = (random / (len(variance) * variance).sqrt()) @ directions.T
    return weight - (weight @ mean)[:, None] * mean / (mean @ mean)
