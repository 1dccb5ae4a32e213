"""What a training run is: model, memory, data, optimiser."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from deltamem_kernels.nn import DeltaMemConfig

STRATEGIES: dict[str, dict[str, Any]] = {
    "tsw": {},
    "ssw": {"memory_write_granularity": "message_mean"},
    "msw": {"num_state_heads": 4},
}
"""Each token writes; the mean of each message; four states side by side."""

BY_STRATEGY: dict[str, dict[str, float]] = {
    "tsw": {},
    "ssw": {"beta_bias": -1.5, "alpha": 16.0, "gap": 0, "steps": 150},
    "msw": {"steps": 150},
}
"""Where a strategy's defaults are not those of Settings. A memory that each token writes has to forget slowly from the
start: gradients then reach the passage through the tokens of other text behind it. A correction is alpha / rank times
what is read, which is the smaller the less is written. Where messages write, that text is one write, as large as the
passage's: such a memory did not learn with it. TSW begins to learn late, between steps 70 and 85 by the seed: 150 steps
are too few."""


@dataclass(frozen=True)
class Settings:
    """The defaults are those of `train.py` for TSW."""

    model: str = "smollm2"
    strategy: str = "tsw"
    rank: int = 8
    alpha: float = 128.0
    beta_bias: float = -4.0
    """a write begins as sigmoid(beta_bias) of what is written, and erases as much"""
    heads: str = "qo"
    """the projections that are corrected"""
    first_layer: int = 0
    """the first one that has a memory"""
    tasks: str = "facts"
    """comma-separated, in turn: facts, recall, dialogue"""
    most: int = 1
    """facts or passwords in a passage: from 1 to so many"""
    gap: int = 32
    """tokens of other text, at most, that are written between a passage and its questions"""
    words: int = 8
    """that an answer is one of, at most"""
    keep: float = 3.0
    """weight of the divergence from the frozen model on other text"""
    steps: int = 300
    batch: int = 24
    """passages in a step, for each process"""
    accumulate: int = 1
    learning_rate: float = 2e-3
    warmup: int = 20
    clip: float = 1.0
    calibrate: int = 1
    """0: v starts from the package's random weights"""
    seed: int = 0
    dtype: str = "bfloat16"
    """of the frozen model; the memory is float32"""

    def memory(self, layers: int) -> DeltaMemConfig:
        return DeltaMemConfig(
            rank=self.rank,
            alpha=self.alpha,
            beta_bias_init=self.beta_bias,
            delta_heads=tuple(self.heads),
            target_layers=tuple(range(self.first_layer, layers)) if self.first_layer else (),
            **STRATEGIES[self.strategy],
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
