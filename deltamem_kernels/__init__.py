"""The memory of δ-mem (arXiv 2605.12357), fused: the delta rule over sequences, exact and differentiable."""

from ._version import __version__
from .backends import BackendStatus, BackendUnavailableError, backends
from .ops.attention_correction import attention_correction
from .ops.attention_correction_norm_rope import attention_correction_norm_rope
from .ops.delta_step import delta_step
from .ops.delta_update import DeltaUpdateOutput, delta_update

__all__ = [
    "BackendStatus",
    "BackendUnavailableError",
    "DeltaUpdateOutput",
    "__version__",
    "attention_correction",
    "attention_correction_norm_rope",
    "backends",
    "delta_step",
    "delta_update",
]
