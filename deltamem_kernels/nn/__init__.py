"""The memory of one layer as a `torch.nn.Module`, and its configuration."""

from .config import DeltaMemConfig
from .memory import DeltaMemory, MemoryRead

__all__ = ["DeltaMemConfig", "DeltaMemory", "MemoryRead"]
