"""The memory of δ-mem (arXiv 2605.12357), fused: the delta rule over sequences, exact and differentiable."""

from ._version import __version__
from .backends import BackendStatus, BackendUnavailableError, backends
from .ops.delta_step import delta_step
from .ops.delta_update import DeltaUpdateOutput, delta_update

__all__ = [
    "BackendStatus",
    "BackendUnavailableError",
    "DeltaUpdateOutput",
    "__version__",
    "backends",
    "delta_step",
    "delta_update",
]
