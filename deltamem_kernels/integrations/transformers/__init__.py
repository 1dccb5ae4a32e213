"""Attach a δ-mem memory to transformers models, which are then used as before."""

from typing import TYPE_CHECKING, Any

from .adapter import load_adapter, save_adapter
from .attach import attach_memory, detach_memory, memory_layers
from .cache import get_memory, set_memory
from .call import MemoryCall
from .states import load_memory, save_memory

if TYPE_CHECKING:
    from .trainer import MemoryCheckpoint

__all__ = [
    "MemoryCall",
    "MemoryCheckpoint",
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


def __getattr__(name: str) -> Any:
    if name != "MemoryCheckpoint":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .trainer import MemoryCheckpoint  # imports the Trainer's module, which takes seconds

    return MemoryCheckpoint
