"""Attach a δ-mem memory to transformers models, which are then used as before."""

from .adapter import load_adapter, save_adapter
from .attach import attach_memory, detach_memory, memory_layers
from .cache import get_memory, set_memory
from .call import MemoryCall
from .states import load_memory, save_memory
from .statistics import LayerStatistics

__all__ = [
    "LayerStatistics",
    "MemoryCall",
    "attach_memory",
    "detach_memory",
    "get_memory",
    "load_adapter",
    "load_memory",
    "memory_layers",
    "save_adapter",
    "save_memory",
    "set_memory",
]
