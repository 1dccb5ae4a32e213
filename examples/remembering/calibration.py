"""Where a memory starts: its values are what the frozen model's hidden states differ in.

Hidden states have a large common part. Random directions read mostly that, and what tells one word from another is a
few percent of what the memory returns: gradient descent finds it late. So the weights of v start as random directions
among the largest principal components, scaled to variance 1, and blind to the mean.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from deltamem_kernels import segment_mean
from deltamem_kernels.integrations.transformers import memory_layers

from .passes import Batch, by_message, write

COMPONENTS = 128


@torch.no_grad()
def calibrate(model, batches: Iterable[Batch], seed: int = 0) -> None:
    """Sets the weights of v of a model's memory, from what it writes of these passages."""
    found: dict[int, list[Tensor]] = {}
    messages = by_message(model)

    def keep(attention: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        kept = batch.passage_mask.bool()
        if messages:
            x, kept = segment_mean(x, batch.message_ids, int(batch.message_ids.max()) + 1)
        found.setdefault(attention.layer_idx, []).append(x[kept].float())

    layers = [attention for _, attention in memory_layers(model)]
    hooks = [attention.register_forward_pre_hook(keep, with_kwargs=True) for attention in layers]
    try:
        for batch in batches:  # which the hooks read
            write(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    generator = torch.Generator().manual_seed(seed)
    for attention in layers:
        weight = attention.delta_memory.memory_v_proj
        weight.copy_(whitening(torch.cat(found[attention.layer_idx]), weight.shape[0], generator))


def whitening(x: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """`[rows, D]`: random directions W; over the rows of `x [N, D]`, W x has a variance near 1 and a mean of 0."""
    x = x.double()
    mean = x.mean(0)
    variance, directions = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))  # ascending
    variance, directions = variance[-COMPONENTS:], directions[:, -COMPONENTS:]
    enough = variance > 1e-6 * variance[-1]
    variance, directions = variance[enough], directions[:, enough]
    random = torch.randn(rows, len(variance), generator=generator).to(x)
    weight = (random / (len(variance) * variance).sqrt()) @ directions.T
    return weight - (weight @ mean)[:, None] * mean / (mean @ mean)
