"""Recall after a long session: write a passage, then much other text, then answer from the states alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .passes import Batch, States, ask, score, write, write_text
from .statistics import interval


@torch.no_grad()
def session(
    model, batch: Batch, text: Tensor, lengths: list[int], rounded: bool, window: int
) -> Iterator[dict[str, Any]]:
    """Yield accuracy, log-likelihood and the mean norm of a layer's state after each length.

    Args:
        batch: passages and their questions.
        text: `[tokens]`, the text written after the passages. It is repeated if it is too short.
        lengths: tokens written since the passage, ascending, multiples of `window`.
        rounded: if True, the states are rounded to bfloat16 after every call.
        window: tokens in a call. Each call sees only its own tokens and the states.
    """
    store = (lambda state: state.bfloat16().float()) if rounded else (lambda state: state)
    states: States = {index: store(state) for index, state in write(model, batch).items()}
    written, passages = 0, len(batch.passage)
    for length in lengths:
        while written < length:
            places = torch.arange(written, written + window, device=text.device) % len(text)
            ids = text[places].expand(passages, window)
            states = {index: store(state) for index, state in write_text(model, ids, states).items()}
            written += window
        found = score(ask(model, batch, states), batch)
        norms = torch.stack([state.flatten(1).norm(dim=1) for state in states.values()])
        yield {
            "tokens": length,
            "state": "bfloat16" if rounded else "float32",
            "accuracy": interval(found.correct, batch.owner.cpu()),
            "log_likelihood": interval(found.log_likelihood, batch.owner.cpu()),
            "norm": norms.mean().item(),
        }
