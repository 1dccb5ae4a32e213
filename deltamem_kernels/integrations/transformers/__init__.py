"""Attach a δ-mem memory to transformers models, which are then used as before."""

from typing import TYPE_CHECKING, Any

try:
    from .adapter import load_adapter, save_adapter
    from .attach import attach_memory, detach_memory, memory_layers
    from .cache import get_memory, set_memory
    from .call import MemoryCall
    from .states import load_memory, save_memory
    from .statistics import LayerStatistics
except ModuleNotFoundError as error:
    if error.name not in ("transformers", "safetensors", "huggingface_hub"):
        raise
    raise ModuleNotFoundError(
        f"{__name__} needs {error.name}, which is not installed: pip install 'deltamem_kernels[transformers]'",
        name=error.name,
    ) from error

if TYPE_CHECKING:
    from .trainer import MemoryCheckpoint

__all__ = [
    "LayerStatistics",
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
