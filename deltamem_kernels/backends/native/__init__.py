"""The backends compiled from csrc/: `cpu` and `cuda`."""

from .cpu import CpuBackend
from .cuda import CudaBackend
from .library import BuildError

__all__ = ["BuildError", "CpuBackend", "CudaBackend"]
