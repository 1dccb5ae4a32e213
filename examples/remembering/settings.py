"""The settings of a training run: model, memory, data and optimizer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from deltamem_kernels.nn import DeltaMemConfig

STRATEGIES: dict[str, dict[str, Any]] = {
    "tsw": {},
    "ssw": {"memory_write_granularity": "message_mean"},
    "msw": {"num_state_heads": 4},
}
"""Write strategies. tsw: every token writes. ssw: the mean of each message writes. msw: four states per layer."""

BY_STRATEGY: dict[str, dict[str, float]] = {
    "tsw": {},
    "ssw": {"beta_bias": -1.5, "alpha": 16.0, "gap": 0, "steps": 150},
    "msw": {"steps": 150},
}
"""Defaults of a strategy that differ from those of `Settings`.

If every token writes, the memory has to forget slowly from the start (a small beta_bias), so that gradients reach the
passage through the other text that follows it. Less is then written and read, and alpha is larger to compensate. If
messages write, the other text is a single write of the same size as the passage's, and the memory did not learn with
it: gap is 0. TSW starts to learn late, between steps 70 and 85 depending on the seed, so 150 steps are too few for it.
"""


@dataclass(frozen=True)
class Settings:
    """Settings of a training run. The defaults are the defaults of `train.py` for TSW."""

    model: str = "smollm2"
    strategy: str = "tsw"
    rank: int = 8
    alpha: float = 128.0
    beta_bias: float = -4.0
    """The write and erase gates start at sigmoid(beta_bias)."""
    heads: str = "qo"
    """The projections that the memory corrects."""
    first_layer: int = 0
    """The first layer with a memory."""
    tasks: str = "facts"
    """Comma-separated tasks, used in turn: facts, recall, dialogue."""
    most: int = 1
    """Maximum number of facts or passwords in a passage."""
    gap: int = 32
    """Maximum number of tokens of other text written between a passage and its questions."""
    words: int = 8
    """Maximum number of possible answers to a question."""
    keep: float = 3.0
    """Weight of the divergence from the frozen model on other text."""
    steps: int = 300
    batch: int = 24
    """Passages in a batch, for each process."""
    accumulate: int = 1
    learning_rate: float = 2e-3
    warmup: int = 20
    clip: float = 1.0
    calibrate: int = 1
    """1 initialises the value weights from hidden states (see calibration.py); 0 keeps the random ones."""
    seed: int = 0
    dtype: str = "bfloat16"
    """Dtype of the frozen model. The memory is float32."""

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
