"""A layer's memory as a module, and its configuration."""

from .config import DeltaMemConfig
from .memory import DeltaMemory, MemoryRead

__all__ = ["DeltaMemConfig", "DeltaMemory", "MemoryRead"]
