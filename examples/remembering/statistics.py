"""Means with 95 % intervals, by a bootstrap over passages: the questions of one passage are not independent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

RESAMPLES = 4000


def interval(values: Tensor, passages: Tensor) -> dict[str, Any]:
    """Mean over all questions, and the interval of a bootstrap whose random numbers are the same on every run.

    Args:
        values: `[Q]`, one for each question.
        passages: `[Q]`: which passage each question is about.
    """
    values = values.double()
    count = int(passages.max()) + 1
    sums, sizes = (torch.zeros(count, dtype=torch.float64).index_add_(0, passages, x) for x in (values, values * 0 + 1))
    picked = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(0))
    means = sums[picked].sum(1) / sizes[picked].sum(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"mean": values.mean().item(), "low": low, "high": high, "questions": len(values), "passages": count}


def apart(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether the first is higher and the intervals do not overlap."""
    return a["low"] > b["high"]


def over_seeds(intervals: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean of the means, and from the lowest to the highest end: what is apart of this is apart for each."""
    return {
        "mean": sum(x["mean"] for x in intervals) / len(intervals),
        "low": min(x["low"] for x in intervals),
        "high": max(x["high"] for x in intervals),
    }
