"""Means with 95 % intervals from a bootstrap over passages, since the questions of one passage are not independent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

RESAMPLES = 4000


def interval(values: Tensor, passages: Tensor) -> dict[str, Any]:
    """Return the mean over all questions and its bootstrap interval. The resampling is the same on every run.

    Args:
        values: `[Q]`, one for each question.
        passages: `[Q]`, the index of each question's passage.
    """
    values = values.double()
    count = int(passages.max()) + 1
    sums, sizes = (torch.zeros(count, dtype=torch.float64).index_add_(0, passages, x) for x in (values, values * 0 + 1))
    picked = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(0))
    means = sums[picked].sum(1) / sizes[picked].sum(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"mean": values.mean().item(), "low": low, "high": high, "questions": len(values), "passages": count}


def apart(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether interval a lies entirely above interval b."""
    return a["low"] > b["high"]


def over_seeds(intervals: list[dict[str, Any]]) -> dict[str, Any]:
    """Combine the intervals of several seeds: the mean of their means, and their lowest and highest ends.

    If the result is apart from another interval, so is the interval of each seed.
    """
    return {
        "mean": sum(x["mean"] for x in intervals) / len(intervals),
        "low": min(x["low"] for x in intervals),
        "high": max(x["high"] for x in intervals),
    }
